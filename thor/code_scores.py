"""Responses to a code benchmark, and the benchmark's own solutions, turned into verdicts.

Invariant: every response gets exactly one verdict of code_tests.KINDS, one without code too; if the sandbox failed on
any, there are no verdicts at all.
"""

import asyncio

from thor.code_answers import answer_of
from thor.code_benchmarks import CodeProblem
from thor.code_tests import INFRASTRUCTURE, Judge, Program, Suite, Verdict, judge_all
from thor.trajectory import Trajectory


def judge_responses(problems: list[CodeProblem], trajectories: list[Trajectory], judge: Judge) -> list[Verdict]:
    """The verdict on each response, whose `correct` is set. ValueError for a problem that is not of this benchmark."""
    known = {problem.id: problem for problem in problems}
    unknown = [trajectory.id for trajectory in trajectories if trajectory.id not in known]
    if unknown:
        raise ValueError(f"the responses have a problem {unknown[0]!r}, which the benchmark has not")
    verdicts = run_all([(known[t.id].tests, answer_of(known[t.id], t)) for t in trajectories], judge)
    for trajectory, verdict in zip(trajectories, verdicts, strict=True):
        trajectory.correct = verdict.passed
    return verdicts


def judge_solutions(problems: list[CodeProblem], judge: Judge) -> dict[str, Verdict]:
    """By problem, what the tests say of the benchmark's own solutions, as if a model had written them."""
    solved = [problem for problem in problems if problem.solution]
    if not solved:
        raise ValueError("this benchmark has no solutions of its own, so its tests cannot be checked")
    verdicts = run_all([(problem.tests, problem.solution) for problem in solved], judge)
    return {problem.id: verdict for problem, verdict in zip(solved, verdicts, strict=True)}


def run_all(candidates: list[tuple[tuple[Suite | Program, ...], str | None]], judge: Judge) -> list[Verdict]:
    """The verdicts on (tests, source) pairs. ValueError if the sandbox failed on any, which is nobody's doing."""
    verdicts = asyncio.run(judge_all(candidates, judge))
    lost = sum(verdict.kind == INFRASTRUCTURE for verdict in verdicts)
    if lost:
        raise ValueError(f"{lost} of {len(verdicts)} candidates could not be tested for failures of the sandbox; "
                         "the same command tests them again")
    return verdicts
