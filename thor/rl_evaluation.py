"""What a run of RL is measured by while it trains: accuracy, pass rate, and where the branches that pass lead.

One sample of each evaluation problem, with noise of its own. The last is the check on the step reward: code that runs
and is of no use earns it, and lowers the accuracy of what is continued from there.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from thor.checkpoint import write_aside
from thor.data import Problem
from thor.filters import branch_reason, branch_reward
from thor.reward import grade
from thor.rl_metrics import all_executions, rate
from thor.rollout import FailedStep, RolloutOptions, Tools, branch_group, continue_branch, solve_group
from thor.trajectory import Trajectory, to_json


Result = TypeVar("Result")


class Spread(Protocol):
    """`await work(problem, ended)` of each problem, on whichever process has room; all results, in order of problem."""

    async def __call__(self, problems: list[Problem], work: Callable[[Problem, Callable[[], None]], Awaitable[Result]],
                       limit: int) -> list[Result]: ...


@dataclass(frozen=True)
class Evaluation:
    """What is solved and how; no branches leaves the step level out. `rollout` is that of training, which stops at a
    failure; an evaluation that solves to the end says so itself. `out` is None where another process writes."""

    problems: list[Problem]
    rollout: RolloutOptions
    num_branches: int
    branch_limit: int
    slots: int
    out: Path | None
    spread: Spread


async def evaluate(tools: Tools, evaluation: Evaluation, number: int) -> dict[str, float | None]:
    """Accuracy and pass rate: one sample of each problem, failures shown, no retry."""
    gate, rollout = asyncio.Semaphore(evaluation.slots), replace(evaluation.rollout, stop_at_failure=False)

    async def work(problem: Problem, ended: Callable[[], None]) -> Trajectory:
        trajectory = await solve_once(tools, problem, rollout, gate)
        ended()
        return trajectory

    found = await evaluation.spread(evaluation.problems, work, evaluation.slots)
    found = [trajectory for trajectory in found if trajectory.finish != "infrastructure"]
    metrics = {"eval/accuracy": rate([trajectory.correct for trajectory in found]), "eval/solved": len(found),
               "eval/pass_rate": rate([execution.passed for execution in all_executions([found])])}
    return metrics | (await continue_branches(tools, evaluation, number) if evaluation.num_branches else {})


async def solve_once(tools: Tools, problem: Problem, rollout: RolloutOptions, gate: asyncio.Semaphore,
                     failures: list[FailedStep] | None = None) -> Trajectory:
    """One graded sample of a problem."""
    found = []

    async def done(trajectory: Trajectory) -> None:
        trajectory.correct = await grade(trajectory)
        found.append(trajectory)

    await solve_group(tools, problem, [0], rollout, gate, done, failures)
    return found[0]


async def continue_branches(tools: Tools, evaluation: Evaluation, number: int) -> dict[str, float | None]:
    """Where the step reward leads: one continuation of each branch that passes, from failures on these problems.

    Code that runs and is of no use earns the step reward and lowers this. The branches are written to branches_N.jsonl
    and what became of them to continued_N.jsonl, for a person to look at.
    """
    gate = asyncio.Semaphore(evaluation.slots)

    async def work(problem: Problem, ended: Callable[[], None]) -> tuple[list[Trajectory], list[Trajectory]]:
        grown = await branch_and_continue(tools, evaluation, problem, gate)
        ended()
        return grown

    in_order = sorted(evaluation.problems, key=lambda problem: problem.id)
    both = await evaluation.spread(in_order, work, evaluation.slots)
    branches, continued = ([trajectory for pair in both for trajectory in pair[half]] for half in (0, 1))
    for name, written in (("branches", branches), ("continued", continued)):
        if evaluation.out is not None:
            write_aside(evaluation.out / f"{name}_{number}.jsonl", "".join(f"{to_json(t)}\n" for t in written))
    return {"step/accuracy_if_continued": rate([t.correct for t in continued]), "step/num_continued": len(continued)}


async def branch_and_continue(tools: Tools, evaluation: Evaluation, problem: Problem,
                              gate: asyncio.Semaphore) -> tuple[list[Trajectory], list[Trajectory]]:
    """The branches of one problem's failure, if it has one, and the continuations of those that pass."""
    rollout, failures = evaluation.rollout, []
    await solve_once(tools, problem, rollout, gate, failures)
    groups = [await branch_group(tools, failed, evaluation.num_branches, evaluation.branch_limit, rollout, gate)
              for failed in failures]
    grown = [(failed, branch) for failed, group in zip(failures, groups, strict=True) for branch in group
             if branch_reason(branch) is None]

    async def go_on(failed: FailedStep, branch: Trajectory) -> Trajectory:
        async with gate:
            continued = await continue_branch(tools, failed, branch, replace(rollout, stop_at_failure=False))
        continued.correct = await grade(continued)
        return continued

    ended = await asyncio.gather(*(go_on(failed, branch) for failed, branch in grown if branch_reward(branch) == 1))
    return [branch for _, branch in grown], [t for t in ended if t.finish != "infrastructure"]
