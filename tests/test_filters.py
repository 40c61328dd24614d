r"""What each RL filter removes, in which order, and what it counts. Tokens are characters: the text is its own ids."""

import pytest
import torch

from thor.filters import TrajectoryFilters, filter_branches, filter_trajectories
from thor.grpo import group_advantages
from thor.trajectory import ACT, OBSERVE, THINK, Execution, Trajectory, add_span

ALL_OFF = TrajectoryFilters(min_response_tokens=0, box_within_last=0, min_group_fraction=0.0)
CODE = "```python\nprint(2)\n```"


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def run(outcome: str = "ok") -> Execution:
    return Execution(outcome, "2", "", 0.0)


def trajectory(*pieces: tuple[str, str], correct: bool = True, finish: str = "eos", outcomes: tuple[str, ...] = (),
               boxed: str | None = "2") -> Trajectory:
    """A response of (kind, text) pieces."""
    spans, ids = [], []
    for kind, text in pieces:
        spans = add_span(spans, kind, len(ids), len(ids) + len(text))
        ids += map(ord, text)
    return Trajectory("a", 0, "1+1", "2", [1], ids, [], spans, [run(outcome) for outcome in outcomes], boxed=boxed,
                      correct=correct, finish=finish)


def plain(text: str = r"So \boxed{2}", correct: bool = True) -> Trajectory:
    return trajectory((THINK, text), correct=correct)


def coded(outcome: str = "ok", correct: bool = True, finish: str = "eos") -> Trajectory:
    return trajectory((THINK, "Add.\n"), (ACT, CODE), (OBSERVE, "\n```output\n2\n```\n"), (THINK, r"\boxed{2}"),
                      correct=correct, outcomes=(outcome,), finish=finish)


def removed(kept_counts: dict[str, int]) -> dict[str, int]:
    """What was removed, without the zeros and the prefix."""
    return {name.partition("removed_")[2]: n for name, n in kept_counts.items() if "removed_" in name and n}


def test_a_trajectory_with_a_failed_execution_is_removed_and_not_punished():
    group = [coded("error", correct=False, finish="failed"), coded(), coded(correct=False)]
    kept = filter_trajectories([group], ALL_OFF, decode)
    assert kept.groups == [group[1:]] and removed(kept.counts) == {"failed_execution": 1}


@pytest.mark.parametrize("outcome", ["silent", "error", "timeout", "memory", "output-limit"])
def test_every_outcome_but_ok_is_a_failed_execution(outcome):
    kept = filter_trajectories([[coded(outcome), coded(), coded(correct=False)]], ALL_OFF, decode)
    assert removed(kept.counts) == {"failed_execution": 1}


def test_an_infrastructure_failure_is_counted_by_itself_at_both_levels():
    lost = coded("infrastructure", correct=False, finish="infrastructure")
    kept = filter_trajectories([[lost, coded(), coded(correct=False)]], ALL_OFF, decode)
    assert removed(kept.counts) == {"infrastructure": 1} and len(kept.groups[0]) == 2
    branches = [branch("infrastructure", finish="infrastructure"), branch("ok"), branch("error")]
    assert removed(filter_branches([branches]).counts) == {"infrastructure": 1}


def test_short_responses_are_those_with_few_trained_tokens_observations_not_counted():
    """The coded response is longer than the other in all, and has fewer trained tokens."""
    long = plain("x" * 50, correct=False)
    assert len(coded().response_ids) > len(long.response_ids)
    kept = filter_trajectories([[coded(), long, plain("x" * 50)]], TrajectoryFilters(45, 0, 0.0), decode)
    assert removed(kept.counts) == {"short": 1} and kept.groups[0][0] is long


def test_the_limit_of_short_responses_is_the_first_length_that_stays():
    group = [plain("x" * 9), plain("x" * 10), plain("x" * 10, False)]
    kept = filter_trajectories([group], TrajectoryFilters(10, 0, 0.0), decode)
    assert removed(kept.counts) == {"short": 1} and len(kept.groups[0]) == 2


@pytest.mark.parametrize("given, stays", [
    (plain(r"So \boxed{2}."), True),
    (plain(r"So \boxed{2}." + "x" * 12), False),  # too early: its first characters are cut off
    (plain(r"\boxed{2}" + "x" * 11), True),  # just within the last 20
    (trajectory((THINK, r"So \boxed{}."), boxed=None), False),
    (trajectory((THINK, "So 2. and so on."), boxed=None), False),
    (trajectory((THINK, "Add."), (ACT, "```python\nprint('\\boxed{2}')\n```"), outcomes=("ok",), boxed=None), False),
    (trajectory((THINK, r"\boxed{2}"), (ACT, "```py\n'\\boxed{2}'\n```"), outcomes=("ok",)), False),
    (trajectory((THINK, r"<think> \boxed{2}"), boxed=None), False),  # a reasoning model has not answered yet
    (trajectory((THINK, r"\boxed{2}"), (ACT, CODE), (OBSERVE, "2" * 30), (THINK, "x"), outcomes=("ok",)), False),
    (trajectory((THINK, r"\boxed{2}"), (OBSERVE, "2" * 30), (THINK, "x")), True),  # observations are no trained tokens
])
def test_the_box_must_stand_within_the_last_trained_tokens(given, stays):
    others = [plain(), plain(correct=False)]
    kept = filter_trajectories([[given, *others]], TrajectoryFilters(0, 20, 0.0), decode)
    assert removed(kept.counts) == ({} if stays else {"no_box_at_end": 1})


def test_a_group_that_keeps_less_than_the_fraction_is_removed_whole():
    failed = [coded("error", False) for _ in range(2)]
    half, less = [*failed, coded(), coded(correct=False)], [*failed, coded("error"), coded(), coded(correct=False)]
    kept = filter_trajectories([half, less], TrajectoryFilters(0, 0, 0.5), decode)
    assert kept.groups == [half[2:]]
    assert removed(kept.counts) == {"failed_execution": 5, "groups_too_few": 1}


def test_a_group_with_one_member_or_with_equal_rewards_is_removed():
    single, equal, good = [coded("error"), coded()], [coded(), coded()], [coded(), coded(correct=False)]
    kept = filter_trajectories([single, equal, good], ALL_OFF, decode)
    assert kept.groups == [good] and removed(kept.counts) == {
        "failed_execution": 1, "groups_below_two": 1, "groups_equal_rewards": 1}


def test_the_filters_apply_in_order_and_a_sample_counts_under_its_first_reason_only():
    everything = trajectory((THINK, "x"), (ACT, CODE), outcomes=("error",), boxed=None, correct=False, finish="failed")
    short_and_boxless = trajectory((THINK, "x"), boxed=None, correct=False)
    long = r"x" * 200 + r"\boxed{2}"
    group = [everything, short_and_boxless, plain(long), plain(long, False)]
    kept = filter_trajectories([group], TrajectoryFilters(), decode)
    assert removed(kept.counts) == {"failed_execution": 1, "short": 1}
    assert kept.counts["trajectory/kept"] == 2 and kept.counts["trajectory/groups_kept"] == 1


def test_a_trajectory_that_hits_the_length_limit_stays_with_its_reward():
    cut = trajectory((THINK, "x" * 30), finish="length", correct=False, boxed=None)
    kept = filter_trajectories([[plain(), cut]], ALL_OFF, decode)
    assert kept.groups == [[plain(), cut]]


def test_advantages_are_computed_over_the_survivors():
    """The failed sample had reward 0; the mean of those that stay is not its business."""
    [group] = filter_trajectories([[coded("error", False), coded(), coded(correct=False)]], ALL_OFF, decode).groups
    rewards = torch.tensor([float(t.correct) for t in group])
    found = group_advantages(rewards, torch.zeros(len(group), dtype=torch.int64))
    assert found[0] == -found[1]


def test_two_copies_of_a_problem_stay_two_groups():
    group = [coded(), coded(correct=False)]
    assert filter_trajectories([group, list(group)], ALL_OFF, decode).groups == [group, group]


def branch(outcome: str | None = "ok", finish: str = "rounds") -> Trajectory:
    """A branch whose block closed, with its outcome; None is one whose block did not."""
    if outcome is None:
        return trajectory((THINK, "so\n```python\nprint("), finish=finish, boxed=None)
    return trajectory((THINK, "so\n"), (ACT, CODE), outcomes=(outcome,), finish=finish, boxed=None)


def test_no_code_block_means_no_execution_reward():
    """EOS before a block and an open block at the limit are removed and counted; they neither passed nor failed."""
    group = [branch(None, finish="eos")] + [branch(None, finish="length")] * 2 + [branch("ok"), branch("error")]
    kept = filter_branches([group])
    assert kept.groups == [group[3:]] and removed(kept.counts) == {"eos_before_code": 1, "no_closed_block": 2}


def test_branch_groups_need_two_survivors_and_unequal_rewards():
    single, equal = [branch(None), branch("ok")], [branch("error"), branch("silent")]
    good = [branch("ok"), branch("timeout"), branch("ok")]
    kept = filter_branches([single, equal, good])
    assert kept.groups == [good]
    assert removed(kept.counts) == {"no_closed_block": 1, "groups_below_two": 1, "groups_equal_rewards": 1}


def test_length_box_and_half_group_filters_do_not_apply_to_branches():
    group = [branch(None) for _ in range(6)] + [branch("ok"), branch("error")]
    assert filter_branches([group]).groups == [group[6:]]


@pytest.mark.parametrize("function", [lambda given: filter_trajectories(given, ALL_OFF, decode), filter_branches])
def test_no_groups_give_no_groups_and_every_count_is_there(function):
    nothing = function([])
    assert nothing.groups == [] and set(nothing.counts.values()) == {0}
    assert set(nothing.counts) == set(function([[branch("ok"), branch("error")]]).counts)


@pytest.mark.parametrize("wrong", [{"min_response_tokens": -1}, {"box_within_last": -1}, {"min_group_fraction": 1.5}])
def test_thresholds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrajectoryFilters(**wrong)
