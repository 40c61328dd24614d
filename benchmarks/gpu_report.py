"""What gpu.py measured, as a table and a roofline.

    python benchmarks/gpu_report.py --file out/gpu.json

Writes FILE.md and, where matplotlib is installed, FILE.png beside it, and prints the table. A line whose row failed
says why, and one whose row was not run says so: no number here is an estimate.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.config import option  # noqa: E402

Found = dict[str, dict]  # the JSON: a row's name -> its numbers


@dataclass
class Options:
    """One flag a field."""

    file: str = option("out/gpu.json", "what gpu.py wrote")


@dataclass(frozen=True)
class Line:
    """A line of the table: which rows it needs, what it should be, and how it reads from their numbers."""

    title: str
    needs: tuple[str, ...]
    bar: str
    text: Callable[[Found], str]


def main(options: Options) -> None:
    """Print and write the table, and draw what can be drawn."""
    path = Path(options.file)
    found = json.loads(path.read_text())
    text = table(found)
    path.with_suffix(".md").write_text(text)
    print(text, end="")
    try:
        draw(found, path.with_suffix(".png"))
    except ImportError:
        print(f"matplotlib is not installed; where it is: python benchmarks/gpu_report.py --file {path}")


def table(found: Found) -> str:
    """The table in markdown, with a line on where it was measured."""
    about = found.get("about", {})
    where = "{device}, torch {torch}, commit {commit}, {date}".format(**about) if about else "Nothing measured"
    rows = [f"| {line.title} | {reading(line, found)} | {line.bar} |" for line in LINES]
    return "\n".join([f"{where}.", "", "| | measured | bar |", "| --- | --- | --- |", *rows, ""])


def reading(line: Line, found: Found) -> str:
    """What a line says: its numbers, or why there are none."""
    missing = [name for name in line.needs if name not in found]
    if missing:
        return "not measured"
    try:
        return line.text(found).replace("|", "/")
    except KeyError as error:
        troubles = [found[name]["trouble"] for name in line.needs if "trouble" in found[name]]
        return f"failed: {'; '.join(troubles or [f'no {error.args[0]}'])}".replace("|", "/").replace("\n", " ")


def decode_text(name: str) -> Callable[[Found], str]:
    """Bytes that had to be read, over the time and the copy's rate."""
    def text(found: Found) -> str:
        row = found[name]
        share = (row["weight_bytes"] + row["key_bytes"]) / row["step_seconds"] / found["ceilings"]["bytes_per_second"]
        return (f"**{share:.1%}** of the bandwidth: {1e3 * row['step_seconds']:.2f} ms a step, "
                f"{row['tokens_per_second']:,.0f} tokens/s, {row['weight_bytes'] / 1e9:.2f} GB of weights and "
                f"{row['key_bytes'] / 1e9:.2f} GB of keys ({arranged(row)})")
    return text


def arranged(row: dict) -> str:
    """How the sampler ran, and what failed before it did."""
    switched = ", ".join(f"{part} {'on' if row[part] else 'off'}" for part in ("kernels", "graphs"))
    return "; ".join([switched, *row.get("errors", [])])


def rate(row: dict) -> float:
    """Sampled tokens a second."""
    return row["tokens"] / row["seconds"]


def faster_text(peer: str) -> Callable[[Found], str]:
    """Our sampled tokens a second over the peer's."""
    def text(found: Found) -> str:
        ours, theirs = rate(found["rollouts"]), rate(found[peer])
        return (f"**{ours / theirs:.2f}×**: {ours:,.0f} against {theirs:,.0f} sampled tokens/s "
                f"({arranged(found['rollouts'])})")
    return text


def hidden_text(found: Found) -> str:
    """What a slow tool adds to the run, over what it takes in one trajectory, and over what it takes in all."""
    row = found["rollouts"]
    added, whole = row["slow_seconds"] - row["seconds"], row["tool_seconds"] * row["trajectories"]
    return (f"**{1 - added / row['tool_seconds']:.1%}** of one trajectory's {row['tool_seconds']:.2f} s, "
            f"{1 - added / whole:.1%} of all {whole:,.0f} s: {row['seconds']:.2f} s with an instant tool, "
            f"{row['slow_seconds']:.2f} s with a slow one")


def mfu_text(found: Found, run: dict) -> str:
    """A training step's FLOP a second over the large product's."""
    share = run["flops_per_second"] / found["ceilings"]["flops_per_second"]
    peak = run["peak_bytes"] / 1e9
    return f"**{share:.1%}**: {run['tokens']:,} tokens in {run['step_seconds']:.3f} s, peak {peak:.1f} GB"


def plain_text(found: Found) -> str:
    """The largest pack, and those before it."""
    runs = found["training"]["plain"]
    return "; ".join(mfu_text(found, run) for run in reversed(runs)) if runs else "no pack fits"


def memory_text(found: Found) -> str:
    """Peak with chunks over the peak with full logits."""
    memory = found["training"]["memory"]
    if not memory["full"]:
        return "not measured (a CPU's memory is not counted)"
    chunked, full = memory["chunked"] / 1e9, memory["full"] / 1e9
    return f"**{chunked / full:.2f}**: {chunked:.2f} of {full:.2f} GB, {memory['tokens']:,} tokens"


def rewind_text(found: Found) -> str:
    """Host time, and what a fork copies once it is written to."""
    row = found["rewind"]
    fork, truncate = 1e6 * row["fork_seconds"], 1e6 * row["truncate_seconds"]
    return (f"fork **{fork:.1f} µs**, truncate **{truncate:.1f} µs**; a fork copies one page of "
            f"{row['copied_bytes'] / 1e6:.2f} MB when first written to ({row['copied_tokens']:.0f} tokens in use)")


def gap_text(found: Found) -> str:
    """Mean and greatest difference for each arrangement."""
    def text(gap: list[float] | str) -> str:
        return f"failed: {gap}" if isinstance(gap, str) else f"mean **{gap[0]:.4f}**, at most {gap[1]:.2f}"

    return "; ".join(f"{name}: {text(gap)}" for name, gap in found["rewind"]["gap"].items())


def ceilings_text(found: Found) -> str:
    """What everything is held against."""
    row = found["ceilings"]
    return (f"copy {row['bytes_per_second'] / 1e12:.2f} TB/s (read and written), product "
            f"{row['flops_per_second'] / 1e12:,.0f} TFLOP/s")


def profile_text(*rows: str) -> Callable[[Found], str]:
    """The kernels that take most of the time."""
    return lambda found: " · ".join(f"{name}: {', '.join(found[name]['profile']) or 'no profile'}" for name in rows)


LINES = [
    Line("ceilings", ("ceilings",), "", ceilings_text),
    Line("decode, 7B shape, one sequence", ("ceilings", "decode_7b"), "≥ 60 %", decode_text("decode_7b")),
    Line("decode, 1.5B shape, 256 sequences at 1–2k", ("ceilings", "decode_1_5b"), "≥ 45 %",
         decode_text("decode_1_5b")),
    Line("where decoding spends its time", ("decode_7b", "decode_1_5b"), "", profile_text("decode_7b", "decode_1_5b")),
    Line("tool rollouts against `generate`", ("rollouts", "generate"), "≥ 8×", faster_text("generate")),
    Line("tool rollouts against `generate_batch`", ("rollouts", "generate_batch"), "≥ 2×",
         faster_text("generate_batch")),
    Line("tool time hidden", ("rollouts",), "≥ 90 %", hidden_text),
    Line("training, 1.5B shape, nothing computed twice", ("ceilings", "training"), "≥ 45 % MFU", plain_text),
    Line("training, checkpointing by layer", ("ceilings", "training"), "≥ 35 % MFU",
         lambda found: mfu_text(found, found["training"]["checkpointed"])),
    Line("the same, norms and feed-forward compiled", ("ceilings", "compiled"), "",
         lambda found: mfu_text(found, found["compiled"]["compiled"])),
    Line("where training spends its time", ("training",), "", profile_text("training")),
    Line("peak memory, chunked over full logits", ("training",), "≤ 0.60", memory_text),
    Line("fork, truncate: host time", ("rewind",), "≤ 20 µs", rewind_text),
    Line("self-correction", ("rewind",), "", lambda found: f"**{found['rewind']['tokens_computed']}** tokens computed, "
         f"{found['rewind']['tokens_kept']:,} kept"),
    Line("sampler–trainer gap on sampled tokens", ("rewind",), "", gap_text),
]


def points(found: Found) -> list[tuple[str, float, float]]:
    """(name, FLOP a byte, FLOP a second) for the roofline; a training step's bytes are its weights, read thrice."""
    rows = []
    for name in ("decode_7b", "decode_1_5b"):
        row = found.get(name, {})
        if "step_seconds" in row:
            intensity = row["flops"] / (row["weight_bytes"] + row["key_bytes"])
            rows.append((name, intensity, row["flops"] / row["step_seconds"]))
    training = found.get("training", {})
    for run in training.get("plain", [])[-1:] + [training[name] for name in ("checkpointed",) if name in training]:
        intensity = run["flops_per_second"] * run["step_seconds"] / (3 * training["weight_bytes"])
        rows.append((f"training, {run['tokens']:,} tokens", intensity, run["flops_per_second"]))
    return rows


def draw(found: Found, path: Path) -> None:
    """The roofline of the measured ceilings with the measured points; nothing without ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceilings = found.get("ceilings", {})
    if "flops_per_second" not in ceilings:
        return
    ridge = ceilings["flops_per_second"] / ceilings["bytes_per_second"]
    intensities = [0.1, ridge, max([10 * ridge, *(2 * point[1] for point in points(found))])]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    roof = [min(i * ceilings["bytes_per_second"], ceilings["flops_per_second"]) for i in intensities]
    axes.loglog(intensities, roof, "k-", label="measured copy and product")
    for name, intensity, attained in points(found):
        axes.loglog([intensity], [attained], "o", label=name)
    axes.set(xlabel="FLOP a byte that must be read", ylabel="FLOP a second", title=found["about"]["device"])
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    config.run(main, Options, __doc__)
