"""TIRGen's funnel: how many trajectories each stage left over, why the others went, and what balancing did.

One report (a dict that becomes funnel.json) is made here, and a table and a picture of it. Invariant: the survivors of
a stage are those of the stage before less what it removed, in all and for each source.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from thor.data import Problem
from thor.tirgen_filters import STAGES, Filtered, FilterSettings
from thor.trajectory import OBSERVE, Trajectory
from thor.tries import Try

MAX_ROUNDS = 7  # this many code blocks and more are one bar of the histogram
SHORTEST, LONGEST = 64, 32768  # trained tokens; the bars of the histogram are between powers of two

Counts = dict[str, int]
Stage = dict[str, str | int | Counts]
Report = dict[str, list[Stage] | dict[str, int | float | bool | Counts | dict[str, Counts]]]


def report(problems: list[Problem], source_field: str, made: list[Try], filtered: Filtered, settings: FilterSettings,
           difficulty: dict[str, tuple[int, int]]) -> Report:
    """Everything that is known of a run, as it goes into funnel.json. `made` are all its tries."""
    sources = {problem.id: str(problem.extra.get(source_field, "all")) for problem in problems}
    stages = [_stage("tries", [sources[each.id] for each in made], {})]
    finished = [each for each in made if each.trajectory is not None]
    stages.append(_stage("finished", [sources[each.id] for each in finished],
                         Counter(each.reason for each in made if each.trajectory is None)))
    left = Counter((each.id, each.sample) for each in finished)
    for name in STAGES:
        removed = [dropped for dropped in filtered.rejected if dropped.stage == name]
        left -= Counter((dropped.trajectory.id, dropped.trajectory.sample) for dropped in removed)
        reasons = Counter(dropped.reason for dropped in removed)
        stages.append(_stage(name, [sources[problem] for problem, _ in left], reasons))
    measured = [difficulty[problem.id] for problem in problems if problem.id in difficulty]
    return {
        "stages": stages,
        "problems": {"all": len(problems), "without_answer": sum(problem.answer is None for problem in problems),
                     "with_a_survivor": len({each.id for each in filtered.kept})},
        "critic": _total(each.critic for each in made),
        "difficulty": {"problems": len(measured), "solved": sum(solved for solved, _ in measured),
                       "samples": sum(drawn for _, drawn in measured)},
        "thresholds": {"max_trivial_share": settings.max_trivial_share, "min_calls": settings.min_calls,
                       "one_call_share": settings.one_call_share},
        "histograms": {"code rounds": _before_and_after(filtered, rounds_histogram),
                       "trained tokens": _before_and_after(filtered, length_histogram)},
    }


def _stage(name: str, sources: Sequence[str], removed: dict[str, int]) -> Stage:
    return {"name": name, "survivors": len(sources), "by_source": dict(sorted(Counter(sources).items())),
            "removed": dict(sorted(removed.items(), key=lambda item: -item[1]))}


def _total(counts: Iterable[Counts]) -> Counts:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)  # not +, which would forget a count of 0
    return dict(total)


def _before_and_after(filtered: Filtered, histogram: Callable[[Iterable[Trajectory]], Counts]) -> dict[str, Counts]:
    return {"before": histogram(filtered.unbalanced), "after": histogram(filtered.kept)}


def rounds_histogram(trajectories: Iterable[Trajectory]) -> Counts:
    """How many trajectories have 0, 1, … code blocks; the last bar is 7 and more."""
    counts = Counter(min(len(each.executions), MAX_ROUNDS) for each in trajectories)
    return {f"≥{MAX_ROUNDS}" if rounds == MAX_ROUNDS else str(rounds): counts[rounds]
            for rounds in range(MAX_ROUNDS + 1) if rounds or counts[0]}


def length_histogram(trajectories: Iterable[Trajectory]) -> Counts:
    """How many trajectories have less than 64 trained tokens, less than 128, …; the last bar is the rest."""
    lengths = [sum(span.end - span.start for span in each.spans if span.kind != OBSERVE) for each in trajectories]
    limits = [SHORTEST]
    while limits[-1] < LONGEST:
        limits.append(2 * limits[-1])
    below = [0, *limits]
    bars = {f"<{limit}": sum(low <= length < limit for length in lengths)
            for low, limit in zip(below, limits, strict=False)}
    return bars | {f"≥{LONGEST}": sum(length >= LONGEST for length in lengths)}


def table(report: Report) -> str:
    """The report for a terminal: a line for each stage, then one for each source if there are several."""
    stages = report["stages"]
    lines = [f"{'stage':<14}{'left':>8}  removed"]
    for stage in stages:
        removed = ", ".join(f"{reason} {count}" for reason, count in stage["removed"].items())
        lines.append(f"{stage['name']:<14}{stage['survivors']:>8}  {removed}".rstrip())
    sources = stages[0]["by_source"]
    if len(sources) > 1:
        lines += ["", f"{'source':<24}" + "".join(f"{stage['name']:>13}" for stage in stages)]
        lines += [f"{source[:23]:<24}" + "".join(f"{stage['by_source'].get(source, 0):>13}" for stage in stages)
                  for source in sources]
    lines.append("")
    lines += [f"{name}: " + ", ".join(f"{key} {value}" for key, value in report[name].items())
              for name in ("problems", "critic", "difficulty", "thresholds") if report[name]]
    for name, both in report["histograms"].items():
        shown = [f"{bar} {count}→{both['after'][bar]}" for bar, count in both["before"].items() if count]
        lines.append(f"{name}, before → after balancing: " + (", ".join(shown) or "none"))
    made, kept = stages[0]["survivors"], stages[-1]["survivors"]
    return "\n".join([*lines, f"yield: {kept} of {made} tries" + (f" ({kept / made:.1%})" if made else "")])


def draw(report: Report, path: Path) -> None:
    """The stages as bars, coloured by source, and the two histograms before and after balancing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, *right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    stages = report["stages"]
    names, bottom = [stage["name"].replace("_", " ") for stage in stages], [0] * len(stages)
    left.set_prop_cycle(color=plt.colormaps["tab20"].colors)  # ten colours are fewer than some problem sets have sources
    for source in stages[0]["by_source"]:
        counts = [stage["by_source"].get(source, 0) for stage in stages]
        left.bar(names, counts, bottom=bottom, label=source)
        bottom = [below + count for below, count in zip(bottom, counts, strict=True)]
    left.bar_label(left.bar(names, bottom, fill=False, linewidth=0), bottom)
    left.set_title("trajectories after each stage")
    left.tick_params(axis="x", rotation=30)
    left.margins(y=0.1)
    if len(stages[0]["by_source"]) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=8, fontsize=8)
    for axis, (title, both) in zip(right, report["histograms"].items(), strict=True):
        bars = [bar for bar in both["before"] if both["before"][bar]] or list(both["before"])[:1]
        places = range(len(bars))
        for shift, key, label in ((-0.2, "before", "before balancing"), (0.2, "after", "after")):
            axis.bar([place + shift for place in places], [both[key][bar] for bar in bars], 0.4, label=label)
        axis.set_xticks(list(places), bars, rotation=30)
        axis.set_title(title)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
