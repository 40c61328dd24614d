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

MAX_LOST_SHARE = 0.1  # of a round's trajectories, lost to the sandbox's own failures, before the run stops

Group = list[Trajectory]

TRAJECTORY_REASONS = ("infrastructure", "failed_execution", "short", "no_box_at_end")
STEP_REASONS = ("infrastructure", "eos_before_code", "no_closed_block")
GROUP_REASONS = ("groups_below_two", "groups_equal_rewards")


@dataclass(frozen=True)
class TrajectoryFilters:
    """Thresholds of method, section 4.1; the defaults are the paper's."""

    min_response_tokens: int = 150  # trained tokens; 0 is off
    box_within_last: int = 100  # trained tokens; 0 is off
    min_group_fraction: float = 0.5  # of the samples that were drawn
    min_group_members: int = 2  # 1 is a quirk (thor/quirks.py): Eq. 3 has no advantage for a group of one

    def __post_init__(self) -> None:
        for name in ("min_response_tokens", "box_within_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (off) or more")
        if not 0 <= self.min_group_fraction <= 1:
            raise ValueError(f"min_group_fraction is {self.min_group_fraction}; it must lie between 0 and 1")


@dataclass(frozen=True)
class Kept:
    """The surviving groups, what was removed, and why: `counts` are samples and groups by reason, names as they go into
    the metrics; `reasons` has one entry for each sample that was given, None for one that stayed."""

    groups: list[Group]
    counts: dict[str, int]
    reasons: list[list[str | None]]


def filter_trajectories(groups: list[Group], filters: TrajectoryFilters, decode: Callable[[list[int]], str]) -> Kept:
    """Method, section 4.1: `groups` hold all samples that were drawn of a problem, graded; `decode` gives tokens' text.

    In this order: failed executions, short responses, no box at the end, groups that kept too few of their samples,
    groups without a difference in reward. Advantages are computed over what this returns.
    """
    def group_reason(survivors: Group, num_drawn: int) -> str | None:
        if not survivors or len(survivors) < filters.min_group_fraction * num_drawn:
            return "groups_too_few"
        return None if len(survivors) == filters.min_group_members == 1 else no_advantage(survivors, trajectory_reward)

    reasons = [[trajectory_reason(trajectory, filters, decode) for trajectory in group] for group in groups]
    return _keep("trajectory", groups, reasons, group_reason, (*TRAJECTORY_REASONS, "groups_too_few", *GROUP_REASONS))


def filter_branches(groups: list[Group], no_code_passes: bool = False) -> Kept:
    """Method, section 4.2: `groups` hold the branches of one failed step each; a branch is one think–act step.

    Removed: what the sandbox lost, EOS before a block, a block still open (or none) at the limit; then groups with
    fewer than two survivors or without a difference in reward. `no_code_passes` keeps branches without a closed block.
    """
    def group_reason(survivors: Group, _: int) -> str | None:
        return no_advantage(survivors, branch_reward)

    reasons = [[branch_reason(branch, no_code_passes) for branch in group] for group in groups]
    return _keep("step", groups, reasons, group_reason, (*STEP_REASONS, *GROUP_REASONS))


def no_advantage(survivors: Group, reward: Callable[[Trajectory], float]) -> str | None:
    """Why Eq. 3 would give a group no advantage: a single member, or rewards that are all equal; None if it does."""
    if len(survivors) < 2:
        return "groups_below_two"
    return "groups_equal_rewards" if len({reward(trajectory) for trajectory in survivors}) == 1 else None


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


def branch_reason(branch: Trajectory, no_code_passes: bool = False) -> str | None:
    """Why a branch does not count at the step level; None if it does."""
    if lost_by_sandbox(branch):
        return "infrastructure"
    if kept_executions(branch):
        assert len(branch.executions) == 1 and branch.spans[-1].kind == ACT, "a branch ends at its first closing fence"
        return None
    if no_code_passes:
        return None
    return "eos_before_code" if branch.finish == "eos" else "no_closed_block"


def lost_by_sandbox(trajectory: Trajectory) -> bool:
    """Whether it ended in a failure of the sandbox, which is never the policy's."""
    outcomes = [execution.outcome for execution in kept_executions(trajectory)]
    return trajectory.finish == "infrastructure" or "infrastructure" in outcomes


def stop_if_lost(groups: list[list[Trajectory]], what: str, number: int) -> None:
    """ValueError if the sandbox itself failed too often in a round: no training goes on without it."""
    everyone = [trajectory for group in groups for trajectory in group]
    lost = sum(trajectory.finish == "infrastructure" for trajectory in everyone)
    if lost > MAX_LOST_SHARE * len(everyone):
        raise ValueError(f"the sandbox failed in {lost} of {len(everyone)} {what} of round {number}, which is not the "
                         "model's doing; the same command continues from the last checkpoint")


def branch_reward(branch: Trajectory) -> float:
    """R' of method, section 4.2, of a branch whose code ran; 1 for one without code, which only a quirk keeps."""
    reward = step_reward(branch.executions[0]) if branch.executions else 1.0
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


def _keep(level: str, groups: list[Group], reasons: list[list[str | None]],
          group_reason: Callable[[Group, int], str | None], names: tuple[str, ...]) -> Kept:
    """What is left once the samples that have a reason are gone, and then the groups that have one."""
    survivors = [[trajectory for trajectory, why in zip(group, of_group, strict=True) if why is None]
                 for group, of_group in zip(groups, reasons, strict=True)]
    gone = [group_reason(group, len(drawn)) for group, drawn in zip(survivors, groups, strict=True)]
    kept = [group for group, why in zip(survivors, gone, strict=True) if why is None]
    removed = Counter(why for of_group in reasons for why in of_group) + Counter(gone)
    counts = {f"{level}/kept": sum(map(len, kept)), f"{level}/groups_kept": len(kept)}
    return Kept(kept, counts | {f"{level}/removed_{name}": removed[name] for name in names},
                [[why or of_group for why in own] for own, of_group in zip(reasons, gone, strict=True)])
