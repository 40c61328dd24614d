"""What a round of RL is measured by: accuracy and pass rate, the two conditional probabilities, signs of reward gaming.

A rate with an empty denominator is None, and its count stands beside it. docs/metrics.md explains each name.
"""

import ast
from statistics import fmean

from thor.template import Template, code_of, imitated_outputs
from thor.trajectory import ACT, FINISHES, Execution, Trajectory, kept_executions, num_observations

Groups = list[list[Trajectory]]


def all_executions(groups: Groups) -> list[Execution]:
    """Every run of every trajectory, in order."""
    return [run for group in groups for trajectory in group for run in kept_executions(trajectory)]


def rate(flags: list[bool]) -> float | None:
    """The share of true ones; None of nothing."""
    return fmean(flags) if flags else None


def trajectory_metrics(groups: Groups) -> dict[str, float | None]:
    """Over all trajectories that were drawn, before any filter; what the sandbox lost is in no rate.

    In training a rollout ends at its first failure, so P(correct | some failed) is 0 wherever its count is not.
    """
    everyone = [trajectory for group in groups for trajectory in group if trajectory.finish != "infrastructure"]
    runs = all_executions([everyone])
    with_code = [trajectory for trajectory in everyone if kept_executions(trajectory)]
    clean = [t for t in with_code if all(run.passed for run in kept_executions(t))]
    failed = [t for t in with_code if not all(run.passed for run in kept_executions(t))]
    return {
        "trajectory/accuracy": rate([t.correct is True for t in everyone]),
        "trajectory/pass_rate": rate([run.passed for run in runs]),
        "trajectory/code_ratio": rate([bool(kept_executions(t)) for t in everyone]),
        "trajectory/correct_if_all_ran": rate([t.correct is True for t in clean]),
        "trajectory/num_all_ran": len(clean),
        "trajectory/correct_if_some_failed": rate([t.correct is True for t in failed]),
        "trajectory/num_some_failed": len(failed),
        "trajectory/tokens": fmean(len(t.response_ids) for t in everyone) if everyone else None,
        "trajectory/imitated_outputs": sum(imitated_outputs(t.text, num_observations(t)) for t in everyone),
        "trajectory/drawn": sum(map(len, groups)),
        **{f"trajectory/finish_{finish}": sum(t.finish == finish for group in groups for t in group) for finish in FINISHES},
    }


def step_metrics(groups: Groups, num_failures: int, template: Template) -> dict[str, float | None]:
    """Over all branches that were grown. A passing branch is trivial if it only prints constants, and suspicious if it
    catches everything: both earn the step reward without solving anything."""
    branches = [branch for group in groups for branch in group if branch.finish != "infrastructure"]
    passed = [branch for branch in branches if branch.executions and branch.executions[0].passed]
    programs = [code_of(template.decode(branch.response_ids[span.start:span.end]))
                for branch in passed for span in branch.spans if span.kind == ACT]
    return {
        "step/failures": num_failures,
        "step/prompts": len(groups),
        "step/pass_rate": rate([bool(b.executions) and b.executions[0].passed for b in branches]),
        "step/tokens": fmean(len(b.response_ids) for b in branches) if branches else None,
        "step/trivial_share": rate([only_prints_constants(program) for program in programs]),
        "step/bare_except_share": rate([catches_everything(program) for program in programs]),
    }


def only_prints_constants(program: str) -> bool:
    """Whether a program computes nothing: no name but print is read or written, and nothing is imported."""
    nodes = nodes_of(program)
    return bool(nodes) and not any(isinstance(node, (ast.Import, ast.ImportFrom, ast.BinOp)) or
                   isinstance(node, ast.Name) and node.id != "print" for node in nodes)


def catches_everything(program: str) -> bool:
    """Whether some handler takes any exception at all."""
    return any(isinstance(node, ast.ExceptHandler) and (node.type is None or isinstance(node.type, ast.Name) and
                                                        node.type.id in ("Exception", "BaseException"))
               for node in nodes_of(program))


def nodes_of(program: str) -> list[ast.AST]:
    """All of a program; nothing of one that runs in a sandbox with another Python and cannot be parsed by this one."""
    try:
        return list(ast.walk(ast.parse(program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
