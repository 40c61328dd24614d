"""The demo's table T1 … T6 from its evaluations, on the console and as Markdown, and the curves of its RL runs.

    python runs/demo_table.py out/demo
    python runs/demo_table.py out/demo,out/demo-1,out/demo-2     # means over seeds
    python runs/demo_table.py --out out/demo-thinking --beside out/demo     # two demos, row by row
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.metrics import bootstrap, cell, plot  # noqa: E402
from thor.data import read_trajectories  # noqa: E402

# Row -> (model, corrections). T6 is T5 with self-correction at inference.
ROWS = {"T1 base, text only": ("t1", 0), "T2 = T1 + text RL": ("t2", 0), "T3 = T1 + cold start": ("t3", 0),
        "T3 + self-correction": ("t3", 4), "T4 = T3 + trajectory RL": ("t4", 0), "T4 + self-correction": ("t4", 4),
        "T5 = T3 + hierarchical RL": ("t5", 0), "T6 = T5 + self-correction": ("t5", 4)}
DIFFERENCES = (("T3 + self-correction", "T3 = T1 + cold start"), ("T4 = T3 + trajectory RL", "T3 = T1 + cold start"),
               ("T5 = T3 + hierarchical RL", "T4 = T3 + trajectory RL"),
               ("T6 = T5 + self-correction", "T5 = T3 + hierarchical RL"))

# The hard variant's further rows: trajectory RL at equal wall-clock.
LONG_ROWS = {"T4-long = T4, for as long as T5 took": ("t4-long", 0), "T4-long + self-correction": ("t4-long", 4)}
LONG_DIFFERENCES = (("T5 = T3 + hierarchical RL", "T4-long = T4, for as long as T5 took"),)
TIMES = {"time/sample": "sampling", "time/execute": "executing", "time/train": "training"}
CURVES = ("trajectory/accuracy", "trajectory/pass_rate", "trajectory/correct_if_all_ran", "step/pass_rate")


@dataclass
class Options:
    """One flag a field."""

    out: str = config.required("directory of the demo, or several, separated by commas, for means over seeds")
    beside: str | None = config.option(None, "directory of another demo, whose rows stand beside this one's")
    equal_rounds: bool = config.option(False, "print how many rounds of T4 take as long as T5 did, and nothing else")


def main(options: Options) -> None:
    """Print and write the tables of both temperatures, and draw the curves."""
    if "," in options.out:
        print(means([Path(name) for name in options.out.split(",")]))
        return
    out = Path(options.out)
    if options.beside is not None:
        print(side_by_side([out, Path(options.beside)]))
        return
    if options.equal_rounds:
        print(equal_rounds(out))
        return
    rows, pairs = rows_of(out)
    parts = [(out / "mix.log").read_text().strip()]  # where the cold start's data came from
    for temperature in ("1.0", "0.6"):
        parts.append(f"Temperature {temperature}\n\n" + table(out, temperature, rows) + "\n\n"
                     + differences(out, temperature, rows, pairs))
    parts.append(shares_of_time(out))
    text = "\n\n".join(parts) + "\n"
    (out / "table.md").write_text(text)
    plot([out / "t4", out / "t5"], out / "curves.png", CURVES)
    print(text + f"\nwritten to {out / 'table.md'}; curves in {out / 'curves.png'}")


def rows_of(out: Path) -> tuple[dict[str, tuple[str, int]], tuple[tuple[str, str], ...]]:
    """The table's rows and differences; the hard variant has more."""
    long = (out / "t4-long").is_dir()
    return (ROWS | LONG_ROWS, DIFFERENCES + LONG_DIFFERENCES) if long else (ROWS, DIFFERENCES)


def means(outs: list[Path]) -> str:
    """Accuracy and pass rate of each row: the mean over seeds, and each seed's."""
    parts = []
    for temperature in ("1.0", "0.6"):
        parts += [f"Temperature {temperature}, mean of {len(outs)} seeds (each)", "",
                  "| | accuracy | execution pass rate |", "| --- | --- | --- |"]
        for name, run in rows_of(outs[0])[0].items():
            found = [metrics_of(out, temperature, *run) for out in outs]
            cells = [mean_cell([accuracy_of(metrics)["value"] for metrics in found]),
                     mean_cell([metrics["execution_pass_rate"]["value"] for metrics in found])]
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def side_by_side(outs: list[Path]) -> str:
    """Accuracy and pass rate of each row in each of the demos; a row that one of them has not (yet) is left out."""
    parts = []
    for temperature in ("1.0", "0.6"):
        parts += [f"Temperature {temperature}", "", "| | " + " | ".join(
            f"{what}, {out.name}" for what in ("accuracy", "pass rate") for out in outs) + " |", "| --- " * 5 + "|"]
        for name, run in ROWS.items():
            if all(json_of(out, temperature, *run).is_file() for out in outs):
                found = [metrics_of(out, temperature, *run) for out in outs]
                cells = [accuracy_of(metrics) for metrics in found] + [metrics["execution_pass_rate"] for metrics in found]
                parts.append(f"| {name} | " + " | ".join(map(cell, cells)) + " |")
        parts.append("")
    return "\n".join(parts)


def mean_cell(values: list[float | None]) -> str:
    """mean (each)."""
    if None in values:
        return "–"
    return f"{sum(values) / len(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def json_of(out: Path, temperature: str, model: str, corrections: int) -> Path:
    """Where an evaluation's numbers are."""
    return out / f"{model}-{temperature}-{corrections}.json"


def metrics_of(out: Path, temperature: str, model: str, corrections: int) -> dict[str, dict]:
    """The metrics of one evaluation."""
    return json.loads(json_of(out, temperature, model, corrections).read_text())["metrics"]


def accuracy_of(metrics: dict[str, dict]) -> dict:
    """avg@n, whatever n was."""
    return metrics[next(key for key in metrics if key.startswith("avg@"))]


def equal_rounds(out: Path) -> int:
    """T4's rounds, so many more that all of them together take the time of T5's."""
    times = {name: [sum(line[key] for key in TIMES) for line in timing_of(out / name)] for name in ("t4", "t5")}
    return max(len(times["t4"]), round(len(times["t4"]) * sum(times["t5"]) / sum(times["t4"])))


def shares_of_time(out: Path) -> str:
    """Where the time of the RL rounds went."""
    lines = []
    for name in ("t4", "t5"):
        seconds = {what: sum(line[key] for line in timing_of(out / name)) for key, what in TIMES.items()}
        total = sum(seconds.values())
        lines.append(f"{name.upper()}: {total:.0f} s of rounds, " + ", ".join(
            f"{what} {part / total:.0%}" for what, part in seconds.items()))
    return "\n".join(lines)


def timing_of(directory: Path) -> list[dict[str, float]]:
    """The lines of a run's timing.jsonl."""
    return [json.loads(line) for line in (directory / "timing.jsonl").read_text().splitlines()]


def table(out: Path, temperature: str, rows: dict[str, tuple[str, int]]) -> str:
    """Accuracy, pass rate and both conditional probabilities of each row, with 95 % intervals over problems."""
    lines = ["| | accuracy | execution pass rate | correct if all ran | correct if some failed |", "| --- " * 5 + "|"]
    for name, run in rows.items():
        metrics = metrics_of(out, temperature, *run)
        cells = [accuracy_of(metrics), metrics["execution_pass_rate"], metrics["correct_if_all_ran"], metrics["correct_if_some_failed"]]
        lines.append(f"| {name} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def differences(out: Path, temperature: str, rows: dict[str, tuple[str, int]], pairs: tuple[tuple[str, str], ...]) -> str:
    """Paired differences in accuracy, problem by problem."""
    lines = ["| difference in accuracy | |", "| --- | --- |"]
    for later, earlier in pairs:
        a, b = (by_problem(out, temperature, *rows[name]) for name in (later, earlier))
        lines.append(f"| {later.split()[0]} {'(corrected) ' if later.startswith('T3 +') else ''}− {earlier.split()[0]} | "
                     + cell(bootstrap([a[key] - b[key] for key in sorted(a)])) + " |")
    return "\n".join(lines)


def by_problem(out: Path, temperature: str, model: str, corrections: int) -> dict[str, float]:
    """Mean correctness of each problem."""
    totals: dict[str, list[bool]] = {}
    for trajectory in read_trajectories(out / f"{model}-{temperature}-{corrections}.responses.jsonl"):
        totals.setdefault(trajectory.id, []).append(trajectory.correct)
    return {key: sum(values) / len(values) for key, values in totals.items()}


if __name__ == "__main__":
    config.run(main, Options, __doc__,
               ["--out", *sys.argv[1:]] if len(sys.argv) == 2 and sys.argv[1][:1] != "-" else None)
