"""The released code's behaviours by name: what each does to a sample or a loss, that the check finds it, and that it is off."""

import contextlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_rl
from thor import audit, config
from thor.batch import Sample
from thor.filters import TrajectoryFilters, filter_branches, filter_trajectories
from thor.quirks import QUIRKS, loosened, misplaced_mask, parse_quirks, random_success, with_misplaced_mask, with_pad
from thor.rollout import FailedStep
from thor.trajectory import ACT, OBSERVE, THINK, Execution, Span, Trajectory, loss_mask

ROOT = Path(__file__).parent.parent
SETTINGS = ["--style", "base", "--instruction", "", "--problems_per_round", "8", "--samples", "6", "--branches", "6",
            "--max_response_tokens", "60", "--suffix_tokens", "6", "--max_branch_tokens", "40", "--updates_per_round", "2",
            "--min_response_tokens", "0", "--box_within_last", "0", "--min_group_fraction", "0", "--threads", "1",
            "--slots", "32", "--dump_every", "1", "--rounds", "1", "--pack_tokens", "150", "--lr", "1e-3"]
OK, FAILED = Execution("ok", "2", "", 0.0), Execution("error", "", "NameError", 0.0)
TWO_STEPS = [Span(THINK, 0, 3), Span(ACT, 3, 5), Span(OBSERVE, 5, 6), Span(THINK, 6, 7), Span(ACT, 7, 9),
             Span(OBSERVE, 9, 11), Span(THINK, 11, 12)]


def trajectory(spans: list[Span], *executions: Execution, correct: bool = True, finish: str = "eos") -> Trajectory:
    """A response of tokens 100, 101, …, its log-probs −1, −2, …, after a prompt of four tokens."""
    logprobs = [None if span.kind == OBSERVE else -1.0 - place for span in spans for place in range(span.start, span.end)]
    return Trajectory("a", 0, "1+1", "2", [1, 2, 3, 4], [100 + place for place in range(spans[-1].end)], logprobs, spans,
                      list(executions), boxed="2", correct=correct, finish=finish)


def test_the_misplaced_mask_is_right_in_the_first_turn_and_hides_policy_tokens_in_the_next():
    mask = misplaced_mask(TWO_STEPS, 12)
    assert [place for place, trained in enumerate(mask) if not trained] == [3, 4, 5]
    assert misplaced_mask(TWO_STEPS[:4], 7) == loss_mask(TWO_STEPS[:4], 7)


def test_under_the_misplaced_mask_a_sample_keeps_one_logprob_for_each_trained_token():
    sample = with_misplaced_mask(Sample([], [], [], advantage=0.5), trajectory(TWO_STEPS, OK, OK))
    assert sample.trained == [False] * 4 + misplaced_mask(TWO_STEPS, 12) and sample.advantage == 0.5
    assert sample.sampler_logprobs == [-1, -2, -3, -7, -8, -9, 0, 0, -12]


def test_a_padded_branch_trains_one_more_token_which_is_the_pad():
    padded = with_pad(Sample([5, 6, 7], [False, True, True], [-0.1, -0.2], advantage=-1.0, is_step=True), 9)
    assert (padded.ids, padded.trained, padded.sampler_logprobs) == ([5, 6, 7, 9], [False, True, True, True], [-0.1, -0.2, 0])
    assert padded.advantage == -1.0 and padded.is_step


@pytest.mark.parametrize("suffix, anchor, start", [(1, 10, 10), (4, 7, 7), (100, 1, 1)])
def test_a_loose_anchor_reaches_into_the_observation_and_the_prompt_but_leaves_one_token(suffix, anchor, start):
    """The failed code begins at token 11 of the sequence, its reasoning at token 10."""
    failed = FailedStep(trajectory(TWO_STEPS[:5], OK, FAILED, finish="failed"), None, 10, 10)
    found = loosened(failed, suffix)
    assert (found.anchor, found.start) == (anchor, start)


def test_a_random_success_is_a_step_that_passed_cut_after_its_code():
    engine = SimpleNamespace(new=lambda ids, key: ids)
    drawn = [[trajectory(TWO_STEPS[:5], OK, FAILED), trajectory([Span(THINK, 0, 3)])]]
    [chosen] = random_success(SimpleNamespace(engine=engine), drawn, 2, random.Random(0))
    assert chosen.sequence == [1, 2, 3, 4, 100, 101, 102, 103, 104] and (chosen.start, chosen.anchor) == (4, 5)
    assert random_success(SimpleNamespace(engine=engine), [drawn[0][1:]], 2, random.Random(0)) == []


def test_a_branch_without_code_is_worth_as_much_as_one_that_ran_if_asked():
    ran, failed, none = (trajectory([Span(ACT, 0, 2)], OK), trajectory([Span(ACT, 0, 2)], FAILED),
                         trajectory([Span(THINK, 0, 2)]))
    assert filter_branches([[ran, failed, none]]).groups == [[ran, failed]]
    kept = filter_branches([[failed, none]], no_code_passes=True)
    assert kept.groups == [[failed, none]]
    assert [sample.advantage > 0 for sample in train_rl.branch_groups(
        kept.groups, options(), SimpleNamespace())[0]] == [False, True]


def test_a_lone_survivor_has_its_reward_as_advantage_if_asked():
    group = [trajectory(TWO_STEPS[:3], OK), trajectory(TWO_STEPS[:3], FAILED, finish="failed")]
    decode = lambda ids: ""  # noqa: E731
    assert filter_trajectories([group], TrajectoryFilters(0, 0, 0.0), decode).groups == []
    kept = filter_trajectories([group], TrajectoryFilters(0, 0, 0.0, min_group_members=1), decode)
    assert kept.groups == [group[:1]]
    assert [s.advantage for s in train_rl.trajectory_groups(kept.groups, options("lone_reward"))[0]] == [1.0]


def options(quirk: str = "") -> train_rl.TrainOptions:
    return train_rl.TrainOptions("model", "problems", "out", quirk=quirk)


def test_an_unknown_quirk_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="'pad' is not known; there are mixed_normaliser, pack_means"):
        options("pack_means, pad")


def test_none_is_on_by_default_and_a_mixed_normaliser_is_the_joint_loss():
    assert options().quirks == parse_quirks(" ") == frozenset() and not options().loss.joint
    assert options("mixed_normaliser").loss.joint


@pytest.fixture(scope="module")
def world(tiny_directory, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    lines = [{"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)} for a in range(6) for b in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--model", str(tiny_directory), "--problems", str(path), *SETTINGS]


# What the check says of each; the suffix of six tokens reaches back over the reasoning "Add." and the prompt's end. In
# this world a right response has one block and no group has a lone survivor, so two of them change nothing.
FOUND = {"pack_means": "trajectory_grpo", "pad_after_code": "trained or not", "no_code_passes": "removed",
         "loose_anchor": "fork", "mixed_normaliser": None, "misplaced_mask": None, "lone_reward": None}


@pytest.mark.parametrize("quirk", FOUND)
def test_a_whole_round_runs_with_every_quirk_and_the_check_finds_it(quirk, world, tmp_path, capsys):
    more = ["--max_branch_tokens", "9"] if quirk == "no_code_passes" else []  # some branches end before their code does
    train_rl.main(config.parse(train_rl.TrainOptions, "", [*world, *more, "--out", str(tmp_path / "rl"), "--quirk", quirk]))
    agrees, printed = audit.audit(tmp_path / "rl"), capsys.readouterr().out
    assert f"made with --quirk {quirk}" in printed
    assert agrees == (FOUND[quirk] is None) and (FOUND[quirk] or "agree") in printed, printed


def test_pack_means_are_averaged_over_the_packs(world, tmp_path):
    """The dump's parts are sums of each pack's own means; the loss is theirs over the number of packs, here several."""
    train_rl.main(config.parse(train_rl.TrainOptions, "", [*world, "--out", str(tmp_path / "rl"), "--quirk", "pack_means"]))
    for line in (tmp_path / "rl" / "dump" / "round_000001" / "updates.jsonl").read_text().splitlines():
        update = json.loads(line)
        sums = sum(update[f"{level}_grpo"] + 0.01 * update[f"{level}_nll"] for level in ("trajectory", "step"))
        packs = sums / update["loss"]
        assert round(packs) > 1 and packs == pytest.approx(round(packs), rel=1e-4)


def test_a_round_without_failures_branches_a_step_that_passed(world, tmp_path):
    """Two samples of one problem, with seeds until neither fails; whether there was anything to learn does not matter."""
    for seed in range(12):
        out = tmp_path / f"rl-{seed}"
        with contextlib.suppress(ValueError):
            train_rl.main(config.parse(train_rl.TrainOptions, "", [
                *world, "--out", str(out), "--quirk", "success_branch", "--problems_per_round", "1", "--samples", "2",
                "--branches", "2", "--seed", str(seed)]))
        line = json.loads((out / "metrics.jsonl").read_text())
        assert line["step/prompts"] == 1
        if not line["step/failures"]:
            return
    pytest.fail("no seed gave a round without failures")


def test_every_quirk_is_explained():
    text = (ROOT / "docs" / "departures.md").read_text()
    assert all(f"--quirk {name}" in text for name in QUIRKS)
