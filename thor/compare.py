"""Is B better than A? Two evaluations, problem by problem, with the uncertainty of their difference.

Paired bootstrap: every draw takes the same problems for both, so what makes a problem hard for both cancels out. Only
problems that both have are compared. What is compared may differ (COMPARED: the model, how it is asked, its
self-correction, the seed), and is printed; what measures must be the same (MEASURED), or --force has to be given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from thor.metrics import BOOTSTRAP_CHUNK, BOOTSTRAP_DRAWS, cell, pass_at_k
from thor.results import Result, Row, Setting, read_result

# Settings that a difference is about. Two seeds are two draws of the same thing; one seed shares what noise it can.
COMPARED = ("model", "style", "system", "instruction", "thinking", "max_corrections", "suffix_tokens", "seed", "dtype")
# Settings that would make a difference by themselves, and versions of what grades.
MEASURED = ("samples", "temperature", "top_p", "top_k", "max_response_tokens", "max_code_rounds", "max_thinking_tokens",
            "cpu_seconds", "grade_seconds", "test_seconds")
GRADERS = ("math-verify", "sympy")
MIN_DECIDED = 6  # problems won or lost, below which one side has all of them by chance in 1 of 20 cases (a sign test)

Shares = tuple[np.ndarray, np.ndarray]  # numerators and denominators of a mean or a pooled rate, float [P] each


@dataclass(frozen=True)
class Comparison:
    """B against A on one benchmark."""

    name: str                 # the benchmark's
    files: str                # another name for it, if several pairs are of one benchmark
    first: list[Row]          # A's and B's rows of the common problems, in the same order
    second: list[Row]
    where: str                # the files, and how many problems they share
    notes: list[str]          # what differs, in words


def compare(paths: Sequence[str], force: bool, picture: str | None) -> None:
    """Print the comparison of A1 B1 [A2 B2 …] or of two directories, and draw it into `picture`."""
    if picture is not None and not (picture.endswith(".png") and Path(picture).parent.is_dir()):
        raise ValueError(f"--out is {picture}; with --compare it is a picture, NAME.png in a directory that exists")
    found = [compare_pair(read_result(one), read_result(other), force) for one, other in pairs(list(map(Path, paths)))]
    if len({comparison.name for comparison in found}) < len(found):  # of one benchmark: called by their files
        found = [replace(comparison, name=comparison.files) for comparison in found]
    print(report(found))
    if picture is not None:
        plot_forest(found, Path(picture))
        print(f"\nwrote {picture}")


def pairs(paths: list[Path]) -> list[tuple[Path, Path]]:
    """Files by twos, or the files of two directories that have the same name; those that one has alone are printed."""
    if len(paths) == 2 and all(path.is_dir() for path in paths):
        one, other = ({path.name for path in directory.glob("*.json") if not path.name.endswith(".settings.json")}
                      for directory in paths)
        if not one & other:
            raise ValueError(f"{paths[0]} and {paths[1]} have no evaluation of the same name, as A/math-500.json and "
                             "B/math-500.json")
        for directory, alone in ((paths[0], one - other), (paths[1], other - one)):
            if alone:
                print(f"only in {directory}, so not compared: {', '.join(sorted(alone))}")
        return [(paths[0] / name, paths[1] / name) for name in sorted(one & other)]
    if len(paths) < 2 or len(paths) % 2 or any(path.is_dir() for path in paths):
        raise ValueError("--compare takes A.json B.json, several such pairs, or two directories; got "
                         + " ".join(map(str, paths)))
    return list(zip(paths[::2], paths[1::2], strict=True))


def compare_pair(first: Result, second: Result, force: bool) -> Comparison:
    """The common problems of two results. ValueError if there are none, or if they were measured differently."""
    measured, unknown = disagreements(first, second)
    if measured and not force:
        raise ValueError(f"{first.path} and {second.path} were measured differently ({'; '.join(measured)}); --force "
                         "compares them all the same")
    both = [name for name in first.rows if name in second.rows]
    names = [name for name in both if first.rows[name].question == second.rows[name].question
             and first.rows[name].tests == second.rows[name].tests]
    if not names:
        raise ValueError(f"{first.path} and {second.path} have no problem in common (the same id, question and tests)")
    notes = [f"measured differently, compared by force: {'; '.join(measured)}"] * bool(measured)
    notes += [f"not recorded in either, so not checked: {', '.join(unknown)}"] * bool(unknown)
    compared, renamed = differing(first, second, COMPARED), len(both) - len(names)
    notes += [f"what is compared: {'; '.join(compared)}"] * bool(compared)
    notes += [f"{renamed} problems have the id of another question or other tests in the other file: not compared"] * bool(renamed)
    files = f"{first.path.stem} → {second.path.stem}"
    alone = f"A has {len(first.rows) - len(names)} more alone, B {len(second.rows) - len(names)}"
    where = f"A is {first.path}, B is {second.path}; {len(names)} common problems, {alone}"
    return Comparison(first.benchmark if first.benchmark == second.benchmark else files, files,
                      [first.rows[name] for name in names], [second.rows[name] for name in names],
                      where, notes)


def disagreements(first: Result, second: Result) -> tuple[list[str], list[str]]:
    """What measures and differs, in words; and the names of what neither file says."""
    graders = [result.settings.get("versions") or {} for result in (first, second)]
    found = differing(first, second, MEASURED)
    found += [f"{name} {_shown(graders[0].get(name))}, {_shown(graders[1].get(name))}" for name in GRADERS
              if graders[0].get(name) != graders[1].get(name)]
    return found, [name for name in MEASURED if first.settings.get(name) is None and second.settings.get(name) is None]


def differing(first: Result, second: Result, names: Sequence[str]) -> list[str]:
    """The settings among `names` that differ, as "temperature 0.6, 1.0"."""
    values = [(name, first.settings.get(name), second.settings.get(name)) for name in names]
    return [f"{name} {_shown(one)}, {_shown(other)}" for name, one, other in values if one != other]


def _shown(value: Setting) -> str:
    text = "(not recorded)" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…".replace("\n", " ")


def measures(rows: list[Row], samples: int) -> dict[str, Shares]:
    """What is compared of one side: means over problems, and a rate pooled over executions."""
    ones = np.ones(len(rows))
    return {
        f"avg@{samples}": (np.array([np.mean(row.correct) for row in rows]), ones),
        f"pass@{samples}": (np.array([pass_at_k(row.samples, sum(row.correct), samples) for row in rows]), ones),
        "execution_pass_rate": (np.array([sum(row.passed) for row in rows], float),
                                np.array([sum(row.run) for row in rows], float)),
        "tokens_generated": (np.array([np.mean(row.tokens_generated) for row in rows]), ones),
    }


def difference_draws(first: Shares, second: Shares, seed: Sequence[int] | int = 0) -> np.ndarray:
    """B − A in each bootstrap draw, float [BOOTSTRAP_DRAWS]; NaN where a draw has nothing to divide by."""
    rng, draws = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAP_DRAWS // BOOTSTRAP_CHUNK):
        drawn = rng.integers(0, len(first[0]), size=(BOOTSTRAP_CHUNK, len(first[0])))
        with np.errstate(invalid="ignore"):  # 0 / 0
            one, other = (top[drawn].sum(1) / bottom[drawn].sum(1) for top, bottom in (first, second))
        draws.append(other - one)
    return np.concatenate(draws)


def interval(value: float, draws: np.ndarray) -> dict[str, float | None]:
    """{"value", "low", "high"} of a difference and its draws, 95 %; all None where it does not exist."""
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def ratio(shares: Shares) -> float:
    """The mean or the rate; NaN where there is nothing to divide by."""
    return float(shares[0].sum() / shares[1].sum()) if shares[1].sum() else float("nan")


def difference(first: Shares, second: Shares) -> dict[str, float | None]:
    """B − A with its 95 % interval: paired bootstrap over problems, 10,000 draws, seed 0."""
    return interval(ratio(second) - ratio(first), difference_draws(first, second))


def accuracies(comparison: Comparison) -> tuple[Shares, Shares]:
    """avg@n of both sides, each over its own samples."""
    return tuple((np.array([np.mean(row.correct) for row in rows]), np.ones(len(rows)))
                 for rows in (comparison.first, comparison.second))


def mean_difference(comparisons: list[Comparison]) -> dict[str, float | None] | None:
    """The mean of the benchmarks' differences, each drawn with noise of its own; None where two share a problem."""
    questions = [row.question for comparison in comparisons for row in comparison.first]
    if len(set(questions)) < sum(len({row.question for row in comparison.first}) for comparison in comparisons):
        return None
    if len(comparisons) == 1:
        return difference(*accuracies(comparisons[0]))
    sides = [accuracies(comparison) for comparison in comparisons]
    draws = [difference_draws(*side, seed=(0, number)) for number, side in enumerate(sides)]
    return interval(float(np.mean([ratio(second) - ratio(first) for first, second in sides])), np.mean(draws, axis=0))


def outcome(comparison: Comparison) -> tuple[int, int, int]:
    """(won, lost, tied): problems that B solves in a larger, a smaller, the same share of its samples."""
    first, second = (side[0] for side in accuracies(comparison))
    return int((second > first).sum()), int((second < first).sum()), int((second == first).sum())


def points(metric: dict[str, float | None]) -> str:
    """A difference of accuracies in percentage points."""
    return f"{100 * metric['value']:+.1f} [{100 * metric['low']:+.1f}, {100 * metric['high']:+.1f}]"


def verdict(metric: dict[str, float | None], decided: int) -> str:
    """What the interval lets us say, where `decided` problems were won or lost: few of them make it too narrow."""
    if 0 < decided < MIN_DECIDED:
        return (f"only {decided} problems were won or lost, fewer than {MIN_DECIDED}, so chance alone may give all of them "
                "to one side: these problems do not tell A and B apart")
    if metric["low"] <= 0 <= metric["high"]:
        return "the interval holds 0: these problems do not tell A and B apart"
    return f"{'B' if metric['value'] > 0 else 'A'} is better, beyond the noise of which problems were asked"


def report(comparisons: list[Comparison]) -> str:
    """Everything in words and Markdown tables."""
    lines = [f"{comparison.name}: {comparison.where}" for comparison in comparisons]
    for note in dict.fromkeys(note for comparison in comparisons for note in comparison.notes):
        names = [comparison.name for comparison in comparisons if note in comparison.notes]
        lines.append(note if len(names) == len(comparisons) else f"{note} (in {', '.join(names)})")
    lines += ["", "| benchmark | problems | A | B | B − A in points | won, lost, tied |", "| --- " * 6 + "|"]
    for comparison in comparisons:
        first, second = accuracies(comparison)
        lines.append(f"| {comparison.name} | {len(comparison.first)} | {ratio(first):.3f} | {ratio(second):.3f} | "
                     f"{points(difference(first, second))} | {', '.join(map(str, outcome(comparison)))} |")
    overall = mean_difference(comparisons)
    if len(comparisons) == 1:
        lines += ["", details(comparisons[0])]
    elif overall is not None:
        means = " | ".join(mean_accuracy(comparisons, side) for side in (0, 1))
        lines.append(f"| mean of the benchmarks | | {means} | {points(overall)} | |")
    decided = sum(sum(outcome(comparison)[:2]) for comparison in comparisons)
    return "\n".join(lines if overall is None else [*lines, "", verdict(overall, decided)])


def mean_accuracy(comparisons: list[Comparison], side: int) -> str:
    """Of A (side 0) or B (side 1) over the benchmarks."""
    return f"{np.mean([ratio(accuracies(comparison)[side]) for comparison in comparisons]):.3f}"


def details(comparison: Comparison) -> str:
    """Every measure of one pair."""
    samples = min(comparison.first[0].samples, comparison.second[0].samples)
    sides = [measures(rows, samples) for rows in (comparison.first, comparison.second)]
    lines = ["| | A | B | B − A |", "| --- " * 4 + "|"]
    for name in sides[0]:
        one, other = (f"{ratio(side[name]):.3f}" if ratio(side[name]) == ratio(side[name]) else "–" for side in sides)
        lines.append(f"| {name} | {one} | {other} | {cell(difference(sides[0][name], sides[1][name]))} |")
    return "\n".join(lines)


def plot_forest(comparisons: list[Comparison], out: Path) -> None:
    """A row a benchmark: B − A in points with its interval, against the line of no difference; their mean below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(f"{c.name} (n = {len(c.first)})", difference(*accuracies(c)), "%d won, %d lost, %d tied" % outcome(c))
            for c in comparisons]
    overall = mean_difference(comparisons)
    if len(rows) > 1 and overall is not None:
        rows.append(("mean of the benchmarks", overall, ""))
    figure, axis = plt.subplots(figsize=(8.5, 1.3 + 0.5 * len(rows)))
    for height, (_, metric, counts) in zip(range(len(rows), 0, -1), rows):
        low, value, high = (100 * metric[key] for key in ("low", "value", "high"))
        whole = not counts  # the mean is a diamond
        axis.errorbar(value, height, xerr=[[value - low], [high - value]], fmt="D" if whole else "o",
                      color="black" if whole else "tab:blue", capsize=3)
        axis.annotate(f"{points(metric)}\n{counts}".strip(), (1.02, height), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8)
    axis.axvline(0, color="grey", lw=1)
    axis.set_yticks(range(len(rows), 0, -1), [label for label, _, _ in rows])
    axis.set_ylim(0.4, len(rows) + 0.6)
    axis.set_xlabel("B − A in points of accuracy, 95 % paired bootstrap over problems")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=110, bbox_inches="tight")
    plt.close(figure)
