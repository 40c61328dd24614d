"""What more tokens buy: accuracy over N samples, or over N_corr retries of a failed step, as a table and a picture.

    python runs/curves.py --curve samples --model DIR --benchmark NAME|FILE --samples 16 --out DIR
    python runs/curves.py --curve corrections --model DIR --benchmark NAME|FILE --samples 4 --out DIR
    python runs/curves.py --curve samples --results A.json B.json --out DIR      # of evaluations that are there

All flags of evaluate.py are taken. `samples` needs one evaluation (OUT/samples.json), `corrections` one for each N_corr
from 0 to --max_corrections (OUT/corrections-N.json); what is there already is not made again. Table and picture are
OUT/curve-samples.md and .png, or OUT/curve-corrections.md and .png, with a panel for each model among --results.
"""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate  # noqa: E402
from thor import config, curves  # noqa: E402
from thor.compare import COMPARED, differing, disagreements  # noqa: E402
from thor.config import option, several  # noqa: E402
from thor.results import Result, read_result  # noqa: E402


@dataclass
class Options(evaluate.EvaluateOptions):
    """The flags of evaluate.py and these."""

    curve: str = option("samples", "samples (best of N) or corrections (self-correction)")
    results: list[str] = several("JSON files of evaluate.py to draw instead of evaluating")


def main(options: Options) -> None:
    """Evaluate what is missing, print and write the table, draw the picture."""
    if options.curve not in ("samples", "corrections"):
        raise ValueError(f"curve is {options.curve!r}; it must be samples or corrections")
    if options.out is None:
        raise ValueError("--out is missing: the directory that evaluations, table and picture are written to")
    if options.compare or options.responses:
        raise ValueError("--compare and --responses belong to evaluate.py; here --results takes its JSON files")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [Path(name) for name in options.results] or evaluations(options, out)
    results = [read_result(path) for path in paths]
    draw = draw_samples if options.curve == "samples" else draw_corrections
    text = draw(results, out / f"curve-{options.curve}.png")
    (out / f"curve-{options.curve}.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nwritten to {out}/curve-{options.curve}.md, drawn in {out}/curve-{options.curve}.png")


def evaluations(options: Options, out: Path) -> list[Path]:
    """The evaluations that the curve needs, made where they are missing or half done."""
    if options.curve == "samples":
        return [evaluated(options, out / "samples.json", options.max_corrections)]
    if options.max_corrections < 1:
        raise ValueError(f"max_corrections is {options.max_corrections}, to which the curve goes from 0; "
                         "it must be 1 or more")
    return [evaluated(options, out / f"corrections-{number}.json", number)
            for number in range(options.max_corrections + 1)]


def evaluated(options: Options, path: Path, max_corrections: int) -> Path:
    """One evaluation, by evaluate.py: it continues what is half done and refuses what was begun with other settings."""
    names = [field.name for field in fields(evaluate.EvaluateOptions)]
    flags = {name: value for name, value in asdict(options).items() if name in names}
    flags |= {"out": str(path), "max_corrections": max_corrections, "resume": False}
    evaluate.main(evaluate.EvaluateOptions(**flags))
    return path


def draw_samples(results: list[Result], picture: Path) -> str:
    """One curve for each result; its table under its model's name."""
    drawn = dict(zip(headings(results), map(curves.best_of_n, results), strict=True))
    curves.plot_best_of_n(drawn, picture)
    return "\n\n".join(f"### {name}\n\n{curves.best_of_n_table(points)}" for name, points in drawn.items())


def draw_corrections(results: list[Result], picture: Path) -> str:
    """One curve for each model among the results; its table under its name."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.model, []).append(result)
    for group in groups.values():
        for result in group[1:]:
            others = differing(group[0], result, [name for name in COMPARED if name != "max_corrections"])
            found = disagreements(group[0], result)[0] + others
            if found:
                raise ValueError(f"{group[0].path} and {result.path} differ in more than max_corrections: "
                                 + "; ".join(found))
    drawn = {name: curves.corrections(group) for name, group in groups.items()}
    curves.plot_corrections(drawn, picture)
    return "\n\n".join(f"### {name}\n\n{curves.corrections_table(points)}" for name, points in drawn.items())


def headings(results: list[Result]) -> list[str]:
    """The models' names; the files' where two are of one model."""
    models = [result.model for result in results]
    return models if len(set(models)) == len(models) else [str(result.path) for result in results]


if __name__ == "__main__":
    config.run(main, Options, __doc__)
