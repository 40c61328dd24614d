"""What a run of RL is measured by while it trains: accuracy, pass rate, and where the branches that pass lead.

One sample of each evaluation problem, with noise of its own. The last is the check on the step reward: code that runs
and is of no use earns it, and lowers the accuracy of what is continued from there.
"""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from thor.checkpoint import write_aside
from thor.data import Problem
from thor.filters import branch_reason, branch_reward
from thor.reward import grade
from thor.rl_metrics import all_executions, rate
from thor.rollout import FailedStep, RolloutOptions, Tools, branch_group, continue_branch, solve_group
from thor.trajectory import Trajectory, to_json


@dataclass(frozen=True)
class Evaluation:
    """What is solved and how; no branches leaves the step level out. `rollout` is that of training, which stops at a
    failure; an evaluation that solves to the end says so itself."""

    problems: list[Problem]
    rollout: RolloutOptions
    num_branches: int
    branch_limit: int
    slots: int
    out: Path


async def evaluate(tools: Tools, evaluation: Evaluation, number: int) -> dict[str, float | None]:
    """Accuracy and pass rate: one sample of each problem, failures shown, no retry."""
    found = await solve_once(tools, evaluation, replace(evaluation.rollout, stop_at_failure=False))
    found = [trajectory for trajectory in found if trajectory.finish != "infrastructure"]
    metrics = {"eval/accuracy": rate([trajectory.correct for trajectory in found]), "eval/solved": len(found),
               "eval/pass_rate": rate([execution.passed for execution in all_executions([found])])}
    return metrics | (await continue_branches(tools, evaluation, number) if evaluation.num_branches else {})


async def solve_once(tools: Tools, evaluation: Evaluation, rollout: RolloutOptions,
                     failures: list[FailedStep] | None = None) -> list[Trajectory]:
    """One graded sample of each evaluation problem, in order."""
    found, gate = {}, asyncio.Semaphore(evaluation.slots)

    async def done(trajectory: Trajectory) -> None:
        trajectory.correct = await grade(trajectory)
        found[trajectory.id] = trajectory

    await asyncio.gather(*(solve_group(tools, problem, [0], rollout, gate, done, failures)
                           for problem in evaluation.problems))
    return [found[problem.id] for problem in evaluation.problems]


async def continue_branches(tools: Tools, evaluation: Evaluation, number: int) -> dict[str, float | None]:
    """Where the step reward leads: one continuation of each branch that passes, from failures on these problems.

    Code that runs and is of no use earns the step reward and lowers this. The branches are written to branches_N.jsonl
    and what became of them to continued_N.jsonl, for a person to look at.
    """
    rollout, failures, gate = evaluation.rollout, [], asyncio.Semaphore(evaluation.slots)
    await solve_once(tools, evaluation, rollout, failures)
    failures.sort(key=lambda failed: failed.trajectory.id)
    groups = await asyncio.gather(*(branch_group(
        tools, failed, evaluation.num_branches, evaluation.branch_limit, rollout, gate) for failed in failures))
    grown = [(failed, branch) for failed, group in zip(failures, groups, strict=True) for branch in group
             if branch_reason(branch) is None]

    async def go_on(failed: FailedStep, branch: Trajectory) -> Trajectory:
        async with gate:
            continued = await continue_branch(tools, failed, branch, replace(rollout, stop_at_failure=False))
        continued.correct = await grade(continued)
        return continued

    ended = await asyncio.gather(*(go_on(failed, branch) for failed, branch in grown if branch_reward(branch) == 1))
    branches, continued = [branch for _, branch in grown], [t for t in ended if t.finish != "infrastructure"]
    for name, written in (("branches", branches), ("continued", continued)):
        write_aside(evaluation.out / f"{name}_{number}.jsonl", "".join(f"{to_json(t)}\n" for t in written))
    return {"step/accuracy_if_continued": rate([t.correct for t in continued]), "step/num_continued": len(continued)}
