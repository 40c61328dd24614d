"""Turn solutions into numbers with their uncertainty.

    python evaluate.py --responses FILE --out FILE.json
    python evaluate.py --model DIR --benchmark NAME|FILE --samples 4 --out FILE.json
    python evaluate.py --compare A.json B.json

The first grades a file of trajectories, the second writes that file first (FILE.responses.jsonl; a killed run
continues), the third says whether B is better than A (thor/compare.py).
A code benchmark (docs/code-benchmarks.md) is named in the first two cases, for its tests are what grades.
Every metric is {value, low, high}: 95 % bootstrap over problems, 10,000 draws, seed 0.
"""

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
from tqdm import tqdm

from generate import GenerateOptions, generate
from thor import config
from thor.answers import question
from thor.benchmarks import read_benchmark
from thor.checkpoint import read_settings, write_aside
from thor.code_answers import as_questions, code_instruction
from thor.code_benchmarks import NAMES, is_code_benchmark, read_code_benchmark
from thor.code_scores import judge_responses, judge_solutions
from thor.code_tests import BROKEN, KINDS, Judge, Verdict
from thor.compare import compare
from thor.config import option, several
from thor.curves import MAX_SUBSETS
from thor.data import Problem, read_trajectories
from thor.metrics import bootstrap, pass_at_k
from thor.results import row_of, to_text
from thor.reward import GRADE_SECONDS, Grader
from thor.template import imitated_outputs
from thor.trajectory import OUTCOMES, Trajectory, kept_executions, num_observations


Group = list[Trajectory]  # the samples of one problem, in order


@dataclass
class EvaluateOptions(GenerateOptions):
    """The flags of generate.py and these."""

    responses: str | None = option(None, "grade this file of trajectories instead of generating")
    benchmark: str | None = option(None, "name of a benchmark, or a JSON-lines file of problems")
    graders: int = option(2, "processes that compare answers")
    resume: bool = option(False, "go on with what --out began, and refuse to begin; without it a begun run goes on too")
    compare: list[str] = several("A.json B.json, several such pairs, or two directories; --out NAME.png draws it")
    force: bool = option(False, "with --compare: also what was measured differently")
    check_canonical: bool = option(False, "test a code benchmark's own solutions, without a model")
    test_seconds: float = option(10.0, "code benchmarks: CPU time of a candidate in all tests that are run as one")


def main(options: EvaluateOptions) -> None:
    """Generate if asked to, grade, print the table, write the JSON; or compare such JSONs."""
    if options.compare:
        return compare(options.compare, options.force, options.out)
    if options.out is None:
        raise ValueError("--out is missing: the JSON file that the numbers are written to")
    out = Path(options.out)
    check_out(out, "failed" if options.check_canonical else "metrics")
    if options.benchmark is not None and is_code_benchmark(options.benchmark):
        evaluate_code(options, out)
        return
    if options.check_canonical:
        raise ValueError(f"--check_canonical tests a code benchmark's own solutions; --benchmark is {options.benchmark}; it "
                         f"must be a file of one, or one of {', '.join(NAMES)}")
    responses = Path(options.responses) if options.responses else generate_responses(options, out)
    groups = by_problem(read_trajectories(responses))
    check_samples(options, groups)
    with Grader(options.graders) as grader:
        disagreements = grade_all(groups, grader)
        metrics = compute_metrics(groups, grader)
        rows = {group[0].id: row_of(group, answer_classes(group, grader)) for group in groups}
        settings = settings_of(options, groups) | {"grader": asdict(grader.counts)}
    write_aside(out, to_text(settings, metrics, rows))
    beside = out.with_name(out.stem + ".disagreements.jsonl")
    beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in disagreements))
    print(table(metrics))
    print(f"{len(groups)} problems × {len(groups[0])} samples · temperature {settings['temperature']} · {out} · "
          f"{len(disagreements)} answers where string match and math-verify differ: {beside}")


def check_out(out: Path, field: str) -> None:
    """ValueError if `out` cannot be written, or holds what is no older result: a JSON object with `field`."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: it is a directory, or the directory it should lie in does not exist")
    try:
        replaceable = not out.is_file() or out.stat().st_size == 0 or field in read_settings(out)
    except ValueError:  # no JSON object at all
        replaceable = False
    if not replaceable:
        raise ValueError(f"{out} is there and holds something else than this writes; name another --out")


def evaluate_code(options: EvaluateOptions, out: Path) -> None:
    """The same for a code benchmark, whose tests decide; problems with broken tests are left out."""
    problems = read_code_benchmark(options.benchmark)
    judge = Judge(options.test_seconds, options.sandbox, options.sandbox_require)
    if options.check_canonical:
        check_canonical(options, judge_solutions(problems, judge), out)
        return
    if options.instruction is None:
        options.instruction = code_instruction(options.style, options.max_code_rounds, problems)
    responses = Path(options.responses) if options.responses else generate_responses(
        options, out, as_questions(problems, options.instruction))
    groups = by_problem(read_trajectories(responses), gold=False)
    check_samples(options, groups)
    trajectories = [trajectory for group in groups for trajectory in group]
    verdicts = judge_responses(problems, trajectories, judge)
    beside = out.with_name(out.stem + ".verdicts.jsonl")
    beside.write_text("".join(  # in ASCII: a candidate's message may hold what UTF-8 cannot write
        json.dumps({"id": t.id, "sample": t.sample} | asdict(verdict)) + "\n"
        for t, verdict in zip(trajectories, verdicts, strict=True)))
    broken = {t.id for t, verdict in zip(trajectories, verdicts, strict=True) if verdict.kind == BROKEN}
    groups = [group for group in groups if group[0].id not in broken]
    if not groups:
        raise ValueError(f"the benchmark's own solutions fail all of its tests: {beside}")
    counts = Counter(verdict.kind for verdict in verdicts)
    metrics = accuracy_metrics(groups) | behaviour_metrics(groups) | {
        "verdicts": {kind: counts[kind] for kind in KINDS if counts[kind]}}
    settings = settings_of(options, groups) | {"broken_tests": sorted(broken)}
    asked, named = {problem.id: problem for problem in problems}, {group[0].id: group for group in groups}
    rows = {name: row_of(group, None, asked[name].task, repr(asked[name].tests)) for name, group in named.items()}
    write_aside(out, to_text(settings, metrics, rows))
    print(table(metrics))
    print(f"{len(groups)} problems × {len(groups[0])} samples · temperature {settings['temperature']} · {out} · "
          f"{len(broken)} problems left out, whose tests fail on the benchmark's own solution · {beside}")


def check_canonical(options: EvaluateOptions, verdicts: dict[str, Verdict], out: Path) -> None:
    """Write and print which of the benchmark's own solutions fail its tests; SystemExit(1) if any does."""
    failed = {problem: asdict(verdict) for problem, verdict in verdicts.items() if not verdict.passed}
    found = {"benchmark": options.benchmark, "problems": len(verdicts), "failed": failed}
    write_aside(out, json.dumps(found, indent=2) + "\n")
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} solutions of {options.benchmark} pass its tests · {out}")
    if failed:
        raise SystemExit(1)


def generate_responses(options: EvaluateOptions, out: Path, problems: list[Problem] | None = None) -> Path:
    """Solve `problems`, else those of the benchmark, which need answers; returns the file of trajectories."""
    if options.benchmark is None:
        raise ValueError("give --responses FILE, or --benchmark NAME|FILE with --model DIR")
    if options.model is None:
        raise ValueError("--model is missing: the Hugging Face directory of the model")
    if problems is None:
        problems = read_benchmark(options.benchmark)
        without = [problem.id for problem in problems if problem.answer is None]
        if without:
            raise ValueError(f"{options.benchmark}: problem {without[0]!r} has no answer, so it cannot be graded")
    responses = out.with_name(out.stem + ".responses.jsonl")
    check_begun(options, responses)
    options.out = str(responses)
    lost = generate(options, problems, responses)
    if lost:
        raise ValueError(f"{lost} trajectories were lost to failures of the sandbox; the same command makes them again")
    return responses


def check_begun(options: EvaluateOptions, responses: Path) -> None:
    """Say aloud that a begun evaluation goes on; ValueError if it should and there is none."""
    begun = responses.is_file() and responses.read_bytes().count(b"\n")
    if begun:
        print(f"{responses} holds {begun} trajectories, and the run goes on from there; another --out begins anew")
    elif options.resume:
        raise ValueError(f"--resume finds nothing begun: {responses} holds no trajectory; leave --resume out to begin")


def by_problem(trajectories: list[Trajectory], gold: bool = True) -> list[Group]:
    """The samples of each problem in order, problems by id: no number depends on what was finished first.

    ValueError if they cannot be compared or, with `gold`, have no answer.
    """
    groups: dict[str, Group] = defaultdict(list)
    for trajectory in trajectories:
        if gold and trajectory.answer is None:
            raise ValueError(f"problem {trajectory.id!r} has no answer, so its solutions cannot be graded")
        groups[trajectory.id].append(trajectory)
    if not groups:
        raise ValueError("the file of responses is empty")
    lost = sum(trajectory.finish == "infrastructure" for trajectory in trajectories)
    if lost:
        raise ValueError(f"{lost} responses were lost to failures of the sandbox, which is not the model's doing: "
                         "take them out of the file and generate them again")
    counts = Counter(len(group) for group in groups.values())
    if len(counts) > 1:
        raise ValueError("problems have different numbers of samples (" + ", ".join(
            f"{problems} have {samples}" for samples, problems in sorted(counts.items())) + "): finish the run first")
    return [sorted(groups[name], key=lambda trajectory: trajectory.sample) for name in sorted(groups)]


def check_samples(options: EvaluateOptions, groups: list[Group]) -> None:
    """ValueError if an evaluation that goes on finds more samples than it is to have."""
    if options.responses is None and len(groups[0]) != options.samples:
        raise ValueError(f"{options.out} holds {len(groups[0])} samples of each problem and --samples is {options.samples}; "
                         "ask for as many, or name another --out")


def grade_all(groups: list[Group], grader: Grader) -> list[dict[str, str | int | bool]]:
    """Set `correct` on every trajectory; returns the answers where plain string match says otherwise."""
    trajectories = [trajectory for group in groups for trajectory in group]
    pairs = [(t.answer, t.boxed) for t in trajectories if t.boxed is not None]
    different = list({question(*pair): pair for pair in pairs}.values())  # each asked once, whichever thread is first
    with ThreadPoolExecutor(8) as pool:
        list(tqdm(pool.map(lambda pair: grader.equivalent(*pair), different), total=len(different), desc="grading"))
    for trajectory in trajectories:
        trajectory.correct = trajectory.boxed is not None and grader.equivalent(trajectory.answer, trajectory.boxed)
    return [{"id": t.id, "sample": t.sample, "gold": t.answer, "boxed": t.boxed, "math_verify": t.correct}
            for t in trajectories if t.boxed is not None and (t.answer.strip() == t.boxed.strip()) != t.correct]


def compute_metrics(groups: list[Group], grader: Grader) -> dict[str, dict[str, float | int | None]]:
    """Every metric of method, section 6, by name."""
    return accuracy_metrics(groups) | choice_metrics(groups, grader) | behaviour_metrics(groups)


def accuracy_metrics(groups: list[Group]) -> dict[str, dict[str, float | int | None]]:
    """avg@n and pass@k."""
    samples = len(groups[0])
    metrics = {f"avg@{samples}": per_problem(groups, lambda group: np.mean([t.correct for t in group]))}
    for k in powers(samples):
        metrics[f"pass@{k}"] = per_problem(groups, lambda g: pass_at_k(len(g), sum(t.correct for t in g), k))
    return metrics


def choice_metrics(groups: list[Group], grader: Grader) -> dict[str, dict[str, float | int | None]]:
    """maj@k and best-of-n, which need to know when two answers are the same."""
    classes = [answer_classes(group, grader) for group in groups]
    metrics = {f"maj@{k}": bootstrap([majority_at_k(g, c, k) for g, c in zip(groups, classes, strict=True)])
               for k in powers(len(groups[0]))[1:]}
    metrics[f"best_of_{len(groups[0])}"] = bootstrap(
        [float(group[best_of(group, c)].correct) for group, c in zip(groups, classes, strict=True)])
    return metrics


def powers(samples: int) -> list[int]:
    """The numbers of samples that a metric is given for: powers of two below all of them, and all of them."""
    return [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < samples] + [samples]


def behaviour_metrics(groups: list[Group]) -> dict[str, dict[str, float | int | None]]:
    """What the responses do: code, tokens, corrections, how they end."""
    metrics = {"code_ratio": share(groups, lambda t: bool(kept_executions(t)), lambda t: True)}
    metrics |= execution_metrics(groups)
    for name, count in (("response_tokens", lambda t: len(t.response_ids)), ("tokens_generated", lambda t: t.tokens_generated),
                        ("corrections", lambda t: t.corrections), ("code_rounds", lambda t: len(kept_executions(t)))):
        metrics[name] = per_problem(groups, lambda group: np.mean([count(t) for t in group]))
    metrics["imitated_outputs"] = per_problem(groups, lambda group: np.mean([
        imitated_outputs(t.text, num_observations(t)) for t in group]))
    outcomes = Counter(run.outcome for group in groups for t in group for run in kept_executions(t))
    finishes = Counter(t.finish for group in groups for t in group)
    metrics["outcomes"] = {outcome: outcomes[outcome] for outcome in OUTCOMES if outcomes[outcome]}
    metrics["finishes"] = dict(sorted(finishes.items()))
    return metrics


def execution_metrics(groups: list[Group]) -> dict[str, dict[str, float | int | None]]:
    """Pass rates pooled over executions, and how often a response is right if all its code ran, or some did not."""
    def all_runs(trajectory: Trajectory) -> list[bool]:
        return [run.passed for run in kept_executions(trajectory)]

    def first_tries(trajectory: Trajectory) -> list[bool]:
        """One entry a step: the first attempt at it, dropped or kept."""
        retried = {attempt.step for attempt in trajectory.attempts}
        kept = [run.passed for step, run in enumerate(trajectory.executions) if run is not None and step not in retried]
        return kept + [False] * len(retried)

    def clean(trajectory: Trajectory) -> bool:
        return all(all_runs(trajectory))

    has_code = lambda t: bool(all_runs(t))  # noqa: E731
    return {
        "execution_pass_rate": pooled(groups, all_runs),
        "first_try_pass_rate": pooled(groups, first_tries),
        "correct_if_all_ran": share(groups, lambda t: t.correct, lambda t: has_code(t) and clean(t)),
        "correct_if_some_failed": share(groups, lambda t: t.correct, lambda t: has_code(t) and not clean(t)),
    }


def per_problem(groups: list[Group], value: Callable[[Group], float]) -> dict[str, float | None]:
    """A mean over problems."""
    return bootstrap([float(value(group)) for group in groups])


def share(groups: list[Group], hit: Callable[[Trajectory], bool],
          among: Callable[[Trajectory], bool]) -> dict[str, float | int | None]:
    """The share of `hit` among the responses for which `among` holds; `n` is how many those are."""
    numbers = [sum(among(t) for t in group) for group in groups]
    hits = [sum(bool(among(t) and hit(t)) for t in group) for group in groups]
    return bootstrap(hits, numbers) | {"n": sum(numbers)}


def pooled(groups: list[Group], outcomes: Callable[[Trajectory], list[bool]]) -> dict[str, float | int | None]:
    """A rate pooled over whatever `outcomes` lists; `n` is how many entries there are."""
    numbers = [sum(len(outcomes(t)) for t in group) for group in groups]
    return bootstrap([sum(sum(outcomes(t)) for t in group) for group in groups], numbers) | {"n": sum(numbers)}


def answer_classes(group: Group, grader: Grader) -> list[int | None]:
    """For each sample the number of its answer's class: the first sample with an equivalent answer; None without a box."""
    classes: list[int | None] = []
    for sample, trajectory in enumerate(group):
        found = None if trajectory.boxed is None else next(
            (first for first in dict.fromkeys(c for c in classes if c is not None)
             if grader.equivalent(group[first].boxed, trajectory.boxed)), sample)
        classes.append(found)
    return classes


def majority_at_k(group: Group, classes: list[int | None], k: int) -> float:
    """Share of the k-subsets of the samples whose largest class is right; all subsets, or MAX_SUBSETS seeded ones."""
    rng = np.random.default_rng(0)
    subsets = list(combinations(range(len(group)), k)) if comb(len(group), k) <= MAX_SUBSETS else [
        sorted(rng.choice(len(group), k, replace=False)) for _ in range(MAX_SUBSETS)]
    return float(np.mean([_majority_is_right(group, classes, subset) for subset in subsets]))


def _majority_is_right(group: Group, classes: list[int | None], subset: tuple[int, ...]) -> bool:
    """Ties go to the class with the lowest sample index; no box at all is wrong."""
    sizes = Counter(classes[sample] for sample in subset if classes[sample] is not None)
    if not sizes:
        return False
    winner = next(sample for sample in subset if classes[sample] is not None
                  and sizes[classes[sample]] == max(sizes.values()))
    return bool(group[winner].correct)


def best_of(group: Group, classes: list[int | None]) -> int:
    """Which sample to trust without a label: highest pass rate of its code (none is 0), largest class, lowest index."""
    sizes = Counter(c for c in classes if c is not None)

    def score(sample: int) -> tuple[float, int, int]:
        runs = [run.passed for run in kept_executions(group[sample])]
        return (sum(runs) / len(runs) if runs else 0.0, sizes[classes[sample]], -sample)

    return max(range(len(group)), key=score)


def settings_of(options: EvaluateOptions, groups: list[Group]) -> dict[str, str | int | float | bool | None]:
    """What made the numbers: the flags, or for a given file what was written beside it; and the versions."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("resume", "compare", "force")}
    if options.responses:
        beside = Path(options.responses + ".settings.json")
        known = read_settings(beside) if beside.is_file() else {}
        settings = {name: known.get(name) for name in settings} | {
            "responses": options.responses, "benchmark": options.benchmark, "graders": options.graders,
            "test_seconds": options.test_seconds}
    versions = {name: version(name) for name in ("torch", "transformers", "math-verify", "sympy")}
    return settings | {"problems": len(groups), "samples": len(groups[0]), "grade_seconds": GRADE_SECONDS,
                       "versions": {"python": platform.python_version(), **versions}}


def table(metrics: dict[str, dict[str, float | int | None]]) -> str:
    """The metrics for a console."""
    lines = []
    for name, metric in metrics.items():
        if "value" not in metric:
            lines.append(f"{name:24} " + ", ".join(f"{key} {count}" for key, count in metric.items()))
        elif metric["value"] is None:
            lines.append(f"{name:24} –")
        else:
            number = f"  (n = {metric['n']})" if "n" in metric else ""
            lines.append(f"{name:24} {metric['value']:8.3f}  [{metric['low']:.3f}, {metric['high']:.3f}]{number}")
    return "\n".join(lines)


if __name__ == "__main__":
    config.run(main, EvaluateOptions, __doc__)
