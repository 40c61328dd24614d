r"""Which samples a loss may see: the filters of RL, in their stated order, each with a count of what it removed.

A trajectory in which code failed is not punished but removed: the step level takes it. What the sandbox lost is
nobody's doing and is removed first. Invariants: a sample is removed for one reason, its first; a group that goes
afterwards is counted as a group; groups are never merged, and their order and that of their samples stays.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from thor.reward import boxed_answer, step_reward, trajectory_reward
from thor.trajectory import ACT, THINK, Trajectory, kept_executions, loss_mask

Group = list[Trajectory]

TRAJECTORY_REASONS = ("infrastructure", "failed_execution", "short", "no_box_at_end")
STEP_REASONS = ("infrastructure", "eos_before_code", "no_closed_block")


@dataclass(frozen=True)
class TrajectoryFilters:
    """Thresholds of method, section 4.1; the defaults are the paper's."""

    min_response_tokens: int = 150  # trained tokens; 0 is off
    box_within_last: int = 100  # trained tokens; 0 is off
    min_group_fraction: float = 0.5  # of the samples that were drawn

    def __post_init__(self) -> None:
        for name in ("min_response_tokens", "box_within_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (off) or more")
        if not 0 <= self.min_group_fraction <= 1:
            raise ValueError(f"min_group_fraction is {self.min_group_fraction}; it must lie between 0 and 1")


@dataclass(frozen=True)
class Kept:
    """The surviving groups, and what was removed: samples and groups by reason, names as they go into the metrics."""

    groups: list[Group]
    counts: dict[str, int]


def filter_trajectories(groups: list[Group], filters: TrajectoryFilters, decode: Callable[[list[int]], str]) -> Kept:
    """Method, section 4.1: `groups` hold all samples that were drawn of a problem, graded; `decode` gives tokens' text.

    In this order: failed executions, short responses, no box at the end, groups that kept too few of their samples,
    groups without a difference in reward. Advantages are computed over what this returns.
    """
    def reason(trajectory: Trajectory) -> str | None:
        return trajectory_reason(trajectory, filters, decode)

    survivors, counts = _remove_samples(groups, reason, TRAJECTORY_REASONS)
    enough = [group for group, drawn in zip(survivors, groups, strict=True)
              if group and len(group) >= filters.min_group_fraction * len(drawn)]
    counts["groups_too_few"] = len(groups) - len(enough)
    return _remove_groups("trajectory", enough, trajectory_reward, counts)


def filter_branches(groups: list[Group]) -> Kept:
    """Method, section 4.2: `groups` hold the branches of one failed step each; a branch is one think–act step.

    Removed: what the sandbox lost, EOS before a block, a block still open (or none) at the limit; then groups with
    fewer than two survivors or without a difference in reward.
    """
    survivors, counts = _remove_samples(groups, branch_reason, STEP_REASONS)
    return _remove_groups("step", survivors, branch_reward, counts)


def trajectory_reason(trajectory: Trajectory, filters: TrajectoryFilters,
                      decode: Callable[[list[int]], str]) -> str | None:
    """Why a trajectory does not count at the trajectory level; None if it does."""
    if lost_by_sandbox(trajectory):
        return "infrastructure"
    if not all(execution.passed for execution in kept_executions(trajectory)):
        return "failed_execution"
    if sum(loss_mask(trajectory.spans, len(trajectory.response_ids))) < filters.min_response_tokens:
        return "short"
    if filters.box_within_last and not boxed_at_end(trajectory, filters.box_within_last, decode):
        return "no_box_at_end"
    return None


def branch_reason(branch: Trajectory) -> str | None:
    """Why a branch does not count at the step level; None if it does."""
    if lost_by_sandbox(branch):
        return "infrastructure"
    if kept_executions(branch):
        assert len(branch.executions) == 1 and branch.spans[-1].kind == ACT, "a branch ends at its first closing fence"
        return None
    return "eos_before_code" if branch.finish == "eos" else "no_closed_block"


def lost_by_sandbox(trajectory: Trajectory) -> bool:
    """Whether it ended in a failure of the sandbox, which is never the policy's."""
    outcomes = [execution.outcome for execution in kept_executions(trajectory)]
    return trajectory.finish == "infrastructure" or "infrastructure" in outcomes


def branch_reward(branch: Trajectory) -> float:
    """R' of method, section 4.2, of a branch whose code ran."""
    reward = step_reward(branch.executions[0])
    assert reward is not None, "what the sandbox lost was removed before"
    return reward


def boxed_at_end(trajectory: Trajectory, num_tokens: int, decode: Callable[[list[int]], str]) -> bool:
    r"""Whether a non-empty \boxed{} stands within the last `num_tokens` trained tokens.

    Read in the policy's own prose, as the answer itself is: a box that the code holds or prints is none.
    """
    places = [(place, span.kind) for span in trajectory.spans if span.kind in (THINK, ACT)
              for place in range(span.start, span.end)]
    prose = [trajectory.response_ids[place] for place, kind in places[-num_tokens:] if kind == THINK]
    return trajectory.boxed is not None and boxed_answer(decode(prose)) is not None


def _remove_samples(groups: list[Group], reason: Callable[[Trajectory], str | None],
                    names: tuple[str, ...]) -> tuple[list[Group], dict[str, int]]:
    """Each group without the samples that have a reason to go, and how many went for each reason."""
    reasons = [[reason(trajectory) for trajectory in group] for group in groups]
    removed = Counter(why for of_group in reasons for why in of_group)
    survivors = [[trajectory for trajectory, why in zip(group, of_group, strict=True) if why is None]
                 for group, of_group in zip(groups, reasons, strict=True)]
    return survivors, {name: removed[name] for name in names}


def _remove_groups(level: str, groups: list[Group], reward: Callable[[Trajectory], float],
                   counts: dict[str, int]) -> Kept:
    """Without the groups that would have no advantage (Eq. 3): a single member, or rewards that are all equal."""
    several = [group for group in groups if len(group) >= 2]
    unequal = [group for group in several if len({reward(trajectory) for trajectory in group}) > 1]
    counts = counts | {"groups_below_two": len(groups) - len(several),
                       "groups_equal_rewards": len(several) - len(unequal)}
    totals = {f"{level}/kept": sum(map(len, unequal)), f"{level}/groups_kept": len(unequal)}
    return Kept(unequal, totals | {f"{level}/removed_{name}": count for name, count in counts.items()})
