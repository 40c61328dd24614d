"""Numbers with their uncertainty, and where a training run writes its own: console, metrics.jsonl, TensorBoard.

metrics.jsonl holds what a seed decides and nothing else, so that a resumed run continues it byte for byte; times, rates
and memory go to timing.jsonl. `python -m thor.metrics DIR [DIR …]` draws the curves of one or more runs.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_CHUNK = 500  # draws at a time, which bounds the memory


def cell(metric: dict) -> str:
    """A metric as a table shows it: value [low, high], and n for a rate over something else than problems."""
    if metric["value"] is None:
        return "–"
    number = f", n = {metric['n']}" if "n" in metric else ""
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]{number}"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right: 1 − C(n−c, k) / C(n, k)  (method, section 6)."""
    if not 0 < k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= {num_samples} samples, got k = {k}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples cannot be correct")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap(numerators_P: Sequence[float], denominators_P: Sequence[float] | None = None,
              seed: int = 0) -> dict[str, float | None]:
    """{"value", "low", "high"}: a mean over problems, or a ratio of sums, with the 95 % interval from resampled problems.

    With `denominators_P` the value is Σ numerators / Σ denominators, each problem bringing its own share of both; draws
    with an empty denominator are left out, and if all are empty everything is None.
    """
    top = np.asarray(numerators_P, dtype=np.float64)
    bottom = np.ones_like(top) if denominators_P is None else np.asarray(denominators_P, dtype=np.float64)
    if len(top) == 0 or bottom.sum() == 0:
        return {"value": None, "low": None, "high": None}
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAP_DRAWS // BOOTSTRAP_CHUNK):
        drawn = rng.integers(0, len(top), size=(BOOTSTRAP_CHUNK, len(top)))
        sums, counts = top[drawn].sum(1), bottom[drawn].sum(1)
        ratios.append(sums[counts > 0] / counts[counts > 0])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return {"value": float(top.sum() / bottom.sum()), "low": float(low), "high": float(high)}


class MetricsLog:
    """The metrics of one run. Opened at `step`, it first cuts away what a killed run wrote after that step."""

    def __init__(self, directory: Path, step: int, tensorboard: bool = True):
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "timing.jsonl"):
            cut_after(directory / name, step)
        self._metrics = open(directory / "metrics.jsonl", "a", encoding="utf-8")
        self._timing = open(directory / "timing.jsonl", "a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here: evaluation and the tests of numbers need no torch
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float | int | None], timing: dict[str, float]) -> None:
        """One line each; keys keep the order they are given in."""
        for file, values in ((self._metrics, metrics), (self._timing, timing)):
            file.write(log_line(step, values) + "\n")
            file.flush()
        for name, value in (metrics | timing).items():
            if self._board is not None and value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close everything."""
        self._metrics.close()
        self._timing.close()
        if self._board is not None:
            self._board.close()


def log_line(step: int, values: dict[str, float | int | None]) -> str:
    """What the log writes of one step: JSON, NaN and infinity as null."""
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": step, **finite}, allow_nan=False)


def cut_after(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`; written aside and renamed, so a kill leaves the old or the new file."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step_of(line) <= step]
    aside = path.with_suffix(".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _step_of(line: str) -> float:
    """The step of a line; infinity for half a line."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except json.JSONDecodeError:
        return math.inf


def read_metrics(directory: Path) -> list[dict[str, float | None]]:
    """The lines of a run's metrics.jsonl. ValueError if there are none."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a training run")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line + "\n") < math.inf]
    if not lines:
        raise ValueError(f"{path} holds no metrics yet")
    return lines


def plot(directories: list[Path], out: Path, only: Sequence[str] = ()) -> None:
    """One small chart for each metric, one line for each run; a run is called by its path if names repeat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unique = len({directory.name for directory in directories}) == len(directories)
    runs = {directory.name if unique else str(directory): read_metrics(directory) for directory in directories}
    names = [name for name in dict.fromkeys(name for lines in runs.values() for line in lines for name in line)
             if name != "step" and (not only or name in only)]
    if not names:
        raise ValueError(f"{', '.join(map(str, directories))}: the lines hold a step and nothing to draw")
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for label, lines in runs.items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axis.plot([step for step, _ in points], [value for _, value in points], label=label,
                      marker="." if len(points) < 20 else None)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel("step")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    try:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__)
            sys.exit(0)
        given = [Path(argument) for argument in sys.argv[1:]]
        if not given:
            raise ValueError("usage: python -m thor.metrics DIR [DIR …]")
        plot(given, given[0] / "metrics.png")
        print(f"wrote {given[0] / 'metrics.png'}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
