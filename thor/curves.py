"""What more tokens buy: accuracy over N samples, chosen from in three ways, and over N_corr retries of a failed step.

Three ways to choose one of N samples (method, section 5 and 6): majority, the largest class of equivalent answers;
best_of, the highest pass rate of its code, then the largest class, which needs no label either; oracle, a right one if
there is any, pass@N. A problem's value at N is its mean over the N-subsets of its samples (all of them, or MAX_SUBSETS
seeded ones); the order of samples decides ties alone, where the lowest wins. Costs are tokens generated, dropped ones too.
All subsets are computed at once; `majority_at_k` and `best_of` of evaluate.py are the slow twins, one subset at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from thor.metrics import bootstrap, cell, pass_at_k
from thor.results import Result, Row

if TYPE_CHECKING:  # else imported where it draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SUBSETS = 1000  # of the samples of one problem; beyond, the mean is over that many seeded ones

# One legend for arrays: S subsets, N samples of a problem.
Metric = dict[str, float | int | None]


@dataclass(frozen=True)
class BestOfN:
    """One point: choosing among n samples, as {value, low, high}; no `majority` where answers have no classes."""

    n: int
    tokens: Metric            # generated a problem, all n samples
    majority: Metric | None
    best_of: Metric
    oracle: Metric
    pass_rate: Metric         # of the code of the sample that best_of chooses; no code is 0


@dataclass(frozen=True)
class Corrected:
    """One point: at most `corrections` retries of a failed step."""

    corrections: int
    tokens: Metric            # generated a response
    accuracy: Metric
    pass_rate: Metric         # pooled over kept executions
    extra_tokens: Metric      # beyond the first point's, paired
    gain: Metric              # of accuracy over the first point, paired


def subsets(samples: int, n: int) -> np.ndarray:
    """The n-subsets of so many samples as a mask, bool [S, N]: all of them, or MAX_SUBSETS seeded ones."""
    rng = np.random.default_rng(0)
    chosen = list(combinations(range(samples), n)) if comb(samples, n) <= MAX_SUBSETS else [
        rng.choice(samples, n, replace=False) for _ in range(MAX_SUBSETS)]
    mask_SN = np.zeros((len(chosen), samples), dtype=bool)
    mask_SN[np.arange(len(chosen))[:, None], np.array(chosen)] = True
    return mask_SN


def class_sizes(row: Row, mask_SN: np.ndarray) -> np.ndarray:
    """For each subset and sample, how many of the subset share its answer, int [S, N]; no box shares nothing."""
    classes_N = np.array([-1 if c is None else c for c in row.classes or [None] * row.samples])
    same_NN = (classes_N[:, None] == classes_N) & (classes_N >= 0)
    return mask_SN.astype(int) @ same_NN.astype(int)


def first_best(mask_SN: np.ndarray, scores_SN: np.ndarray) -> np.ndarray:
    """The member of each subset with the highest score (>= 0), int [S]; ties go to the lowest sample."""
    return np.where(mask_SN, scores_SN, -1).argmax(1)


def majority(row: Row, mask_SN: np.ndarray) -> float:
    """Share of the subsets whose largest class is right; ties: the class with the lowest sample; no box is wrong."""
    return float(np.array(row.correct)[first_best(mask_SN, class_sizes(row, mask_SN))].mean())


def pass_rates(row: Row) -> np.ndarray:
    """Of each sample's code, float [N]; 0 where none ran."""
    return np.array([passed / run if run else 0.0 for passed, run in zip(row.passed, row.run, strict=True)])


def best_of(row: Row, mask_SN: np.ndarray) -> np.ndarray:
    """The sample chosen from each subset, int [S]: highest pass rate, then the largest class, then the lowest one."""
    _, ranks_N = np.unique(pass_rates(row), return_inverse=True)
    return first_best(mask_SN, ranks_N * (row.samples + 1) + class_sizes(row, mask_SN))


def best_of_n(result: Result) -> list[BestOfN]:
    """The curve over n = 1 … samples."""
    return [_best_of_n(list(result.rows.values()), n, subsets(result.samples, n))
            for n in range(1, result.samples + 1)]


def _best_of_n(rows: list[Row], n: int, mask_SN: np.ndarray) -> BestOfN:
    chosen = [best_of(row, mask_SN) for row in rows]
    classed = all(row.classes is not None for row in rows)
    return BestOfN(
        n, bootstrap([n * float(np.mean(row.tokens_generated)) for row in rows]),
        bootstrap([majority(row, mask_SN) for row in rows]) if classed else None,
        bootstrap([float(np.array(row.correct)[picks].mean()) for row, picks in zip(rows, chosen, strict=True)]),
        bootstrap([pass_at_k(row.samples, sum(row.correct), n) for row in rows]),
        bootstrap([float(pass_rates(row)[picks].mean()) for row, picks in zip(rows, chosen, strict=True)]))


def corrections(results: Sequence[Result]) -> list[Corrected]:
    """The curve over N_corr, one result each, in rising order. ValueError unless they solved the same problems."""
    ordered = sorted(results, key=retries)
    if len(ordered) < 2 or len({retries(result) for result in ordered}) < len(ordered):
        raise ValueError("a curve over corrections needs two results or more of a model, each with another "
                         f"max_corrections; got {', '.join(str(result.path) for result in ordered)}")
    base = ordered[0].rows
    for result in ordered:
        asked, others = ({name: (row.question, row.tests) for name, row in rows.items()}
                         for rows in (base, result.rows))
        if asked != others:
            raise ValueError(f"{result.path} has other problems than {ordered[0].path}; a curve needs the same ones")
    return [_corrected(retries(result), [result.rows[name] for name in base], list(base.values()))
            for result in ordered]


def retries(result: Result) -> int:
    """N_corr of an evaluation."""
    found = result.settings.get("max_corrections")
    if not isinstance(found, int):
        raise ValueError(f"{result.path} does not say its max_corrections, so it has no place on the curve")
    return found


def _corrected(number: int, rows: list[Row], base: list[Row]) -> Corrected:
    def tokens(row: Row) -> float:
        return float(np.mean(row.tokens_generated))

    def accuracy(row: Row) -> float:
        return float(np.mean(row.correct))

    return Corrected(
        number, bootstrap(list(map(tokens, rows))), bootstrap(list(map(accuracy, rows))),
        bootstrap([sum(row.passed) for row in rows], [sum(row.run) for row in rows]),
        bootstrap([tokens(row) - tokens(before) for row, before in zip(rows, base, strict=True)]),
        bootstrap([accuracy(row) - accuracy(before) for row, before in zip(rows, base, strict=True)]))


def best_of_n_table(points: list[BestOfN]) -> str:
    """The curve as Markdown."""
    lines = ["| N | tokens a problem | majority | best_of | oracle | pass rate of best_of's choice |",
             "| --- " * 6 + "|"]
    lines += [f"| {p.n} | {p.tokens['value']:.0f} | {cell(p.majority) if p.majority else '–'} | {cell(p.best_of)} | "
              f"{cell(p.oracle)} | {cell(p.pass_rate)} |" for p in points]
    return "\n".join(lines)


def corrections_table(points: list[Corrected]) -> str:
    """The curve as Markdown, and in a sentence what self-correction costs and what it buys."""
    lines = ["| N_corr | tokens a response | accuracy | execution pass rate | extra tokens | gain in accuracy |",
             "| --- " * 6 + "|"]
    for p in points:
        value, low, high = (p.extra_tokens[key] for key in ("value", "low", "high"))
        lines.append(f"| {p.corrections} | {p.tokens['value']:.1f} | {cell(p.accuracy)} | {cell(p.pass_rate)} | "
                     f"{value:.1f} [{low:.1f}, {high:.1f}] | {cell(p.gain)} |")
    return "\n".join(lines) + "\n\n" + cost_and_gain(points[0], points[-1])


def cost_and_gain(first: Corrected, last: Corrected) -> str:
    """What the last point costs and buys beside the first."""
    low, gain, high = (100 * last.gain[key] for key in ("low", "value", "high"))
    rates = "" if None in (first.pass_rate["value"], last.pass_rate["value"]) else (
        f"; the execution pass rate goes from {first.pass_rate['value']:.3f} to {last.pass_rate['value']:.3f}")
    return (f"{last.corrections} retries instead of {first.corrections} cost {last.extra_tokens['value']:+.1f} tokens "
            f"a response ({last.extra_tokens['value'] / first.tokens['value']:+.1%}) and buy {gain:+.1f} points of "
            f"accuracy [{low:.1f}, {high:.1f}]{rates}.")


def plot_best_of_n(curves: dict[str, list[BestOfN]], out: Path) -> None:
    """One panel a model: the three ways to choose over the tokens of a problem; the pass rate of the choice, dashed."""
    figure, panels = _panels(len(curves))
    for axis, (name, points) in zip(panels, curves.items(), strict=True):
        tokens = [point.tokens["value"] for point in points]
        for label in ("oracle", "best_of", "majority"):
            _draw(axis, tokens, [getattr(point, label) for point in points], label)
        axis.plot(tokens, [point.pass_rate["value"] for point in points], "k--", lw=1,
                  label="pass rate of best_of's choice")
        axis.set_xscale("log", base=2)
        for point in points:
            if point.n & (point.n - 1) == 0:
                axis.annotate(f"N={point.n}", (point.tokens["value"], 0.015), xycoords=("data", "axes fraction"),
                              ha="center", fontsize=7, color="grey")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("tokens generated a problem")
        axis.set_xticks([p.tokens["value"] for p in points if p.n & (p.n - 1) == 0],
                        [f"{p.tokens['value']:.0f}" for p in points if p.n & (p.n - 1) == 0])
        axis.minorticks_off()
    _finish(figure, panels, out)


def plot_corrections(curves: dict[str, list[Corrected]], out: Path) -> None:
    """One panel a model: accuracy and execution pass rate over the tokens of a response, a mark for each N_corr."""
    figure, panels = _panels(len(curves))
    for axis, (name, points) in zip(panels, curves.items(), strict=True):
        tokens = [point.tokens["value"] for point in points]
        _draw(axis, tokens, [point.accuracy for point in points], "accuracy")
        _draw(axis, tokens, [point.pass_rate for point in points], "execution pass rate")
        for point in points:
            axis.annotate(f"{point.corrections}", (point.tokens["value"], point.accuracy["value"]), fontsize=7,
                          textcoords="offset points", xytext=(0, 6), ha="center")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("tokens generated a response (N_corr at each mark)")
    _finish(figure, panels, out)


def _panels(number: int) -> tuple["Figure", list["Axes"]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, number, figsize=(4.2 * number + 0.6, 3.6), squeeze=False, sharey=True)
    return figure, list(axes.flat)


def _draw(axis: "Axes", tokens: list[float], metrics: list[Metric | None], label: str) -> None:
    """A line with its 95 % band; nothing for what does not exist."""
    if any(metric is None or metric["value"] is None for metric in metrics):
        return
    line, = axis.plot(tokens, [metric["value"] for metric in metrics], marker=".", label=label)
    axis.fill_between(tokens, [metric["low"] for metric in metrics], [metric["high"] for metric in metrics],
                      color=line.get_color(), alpha=0.15, lw=0)


def _finish(figure: "Figure", panels: list["Axes"], out: Path) -> None:
    import matplotlib.pyplot as plt

    panels[0].set_ylim(-0.04, 1.04)
    panels[0].set_ylabel("share, with 95 % over problems")
    for axis in panels:
        axis.grid(alpha=0.3)
    panels[-1].legend(fontsize=7, loc="best")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
