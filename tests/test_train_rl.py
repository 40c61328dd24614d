"""Hierarchical RL on the tiny world: it learns, it repeats, it survives being killed, and it says what is wrong."""

import asyncio
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_rl
from thor import config
from thor.batch import Sample
from thor.data import read_lines
from thor.parallel import open_ranks
from thor.rl_metrics import catches_everything, only_prints_constants
from thor.template import load_template
from thor.trajectory import from_json
from train_rl import TrainOptions

ROOT = Path(__file__).parent.parent
SETTINGS = ["--style", "base", "--instruction", "", "--problems_per_round", "8", "--samples", "6", "--branches", "6",
            "--updates_per_round", "2", "--max_response_tokens", "60", "--suffix_tokens", "6", "--max_branch_tokens", "40",
            "--min_response_tokens", "0", "--box_within_last", "0", "--min_group_fraction", "0.25", "--lr", "3e-4",
            "--nll_weight", "0.1", "--threads", "1", "--slots", "32"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    lines = [{"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)} for a in range(6) for b in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(model: Path, problems: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--problems", str(problems), "--out", str(out), *SETTINGS, *more]


def train(*given: str) -> None:
    train_rl.main(config.parse(TrainOptions, "", list(given)))


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def written(out: Path) -> bytes:
    path = out / "metrics.jsonl"
    return path.read_bytes() if path.is_file() else b""


@pytest.fixture(scope="module")
def trained(tiny_directory, problems, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "rl"
    train(*arguments(tiny_directory, problems, out, "--rounds", "5", "--groups_per_round", "5", "--max_passes", "2",
                     "--eval_problems", str(problems), "--eval_every", "5"))
    return out


def test_code_that_fails_becomes_rarer(trained):
    lines = metrics_of(trained)
    assert len(lines) == 5 and lines[-1]["trajectory/pass_rate"] > lines[0]["trajectory/pass_rate"]
    assert lines[0]["step/prompts"] > 0 and lines[0]["step/pass_rate"] > 0 and lines[-1]["eval/pass_rate"] > 0.6


def test_every_sample_is_kept_or_counted_under_one_reason(trained):
    for line in metrics_of(trained):
        removed = sum(line[f"trajectory/removed_{name}"] for name in ("infrastructure", "failed_execution", "short",
                                                                      "no_box_at_end"))
        assert line["trajectory/kept"] + removed <= line["trajectory/drawn"]
        assert line["trajectory/removed_failed_execution"] == line["trajectory/finish_failed"] == line["step/failures"]
        assert line["step/prompts"] <= 8, "at most as many step prompts as problems in a pass"


def test_the_trainer_scores_what_the_sampler_sampled(trained):
    assert all(line["policy/sampler_gap_max"] < 2e-4 for line in metrics_of(trained))


def test_every_number_that_a_round_logs_is_explained(trained):
    explained = set(re.findall(r"`([\w/*]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    families = tuple(name.rstrip("*") for name in explained if name.endswith("*"))
    logged = {name for line in metrics_of(trained) for name in line} | set(
        json.loads((trained / "timing.jsonl").read_text().splitlines()[0]))
    assert {name for name in logged if name not in explained | {"step"} and not name.startswith(families)} == set()


def test_surplus_groups_are_carried_to_the_next_round(trained):
    lines = metrics_of(trained)
    assert any(line["trajectory/groups_carried"] for line in lines)
    assert all(line["trajectory/groups_used"] <= 5 for line in lines)


def test_each_passing_branch_of_an_evaluation_is_continued_once(trained):
    """Read back from what a person would look at; a continuation's prompt holds its branch."""
    branches, continued = ([from_json(line) for _, line in read_lines(trained / f"{name}_5.jsonl")]
                           for name in ("branches", "continued"))
    passed = [branch for branch in branches if branch.executions[0].passed]
    assert 0 < len(passed) == len(continued)
    for branch, after in zip(passed, continued, strict=True):
        written = branch.prompt_ids + branch.response_ids
        assert after.prompt_ids[:len(written)] == written and after.id == branch.id
        prompt = load_template(trained / "latest", "base", "", None, False).prompt_ids(branch.question)
        assert len(after.prompt_ids + after.response_ids) <= len(prompt) + 60, "budgets are the trajectory's"
    last = metrics_of(trained)[-1]
    assert last["step/num_continued"] == len(continued)
    assert last["step/accuracy_if_continued"] == sum(t.correct for t in continued) / len(continued)


def test_the_checkpoint_is_a_model_like_any_other(trained, problems):
    from generate import GenerateOptions, generate
    from thor.data import read_problems
    out = trained / "again.jsonl"
    options = config.parse(GenerateOptions, "", ["--model", str(trained / "latest"), "--style", "base", "--instruction", "",
                                                 "--max_response_tokens", "60"])
    generate(options, read_problems(problems)[:4], out)
    assert len(out.read_text().splitlines()) == 4


def test_a_finished_run_says_that_nothing_is_left_to_do(trained, tiny_directory, problems, capsys):
    train(*arguments(tiny_directory, problems, trained, "--rounds", "5", "--groups_per_round", "5", "--max_passes", "2",
                     "--eval_problems", str(problems), "--eval_every", "5"))
    assert "nothing left to do" in capsys.readouterr().out


def test_a_run_killed_at_any_moment_continues_as_if_nothing_had_happened(trained, tiny_directory, problems, tmp_path):
    """SIGKILL five times after random delays, in sampling, updating or writing; then metrics.jsonl is the same."""
    out, rng = tmp_path / "killed", random.Random(3)
    given = [sys.executable, str(ROOT / "train_rl.py"), *arguments(
        tiny_directory, problems, out, "--rounds", "5", "--groups_per_round", "5", "--max_passes", "2",
        "--eval_problems", str(problems), "--eval_every", "5")]
    kills = 0
    while kills < 5:
        process = subprocess.Popen(given, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = written(out)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and (
                not (out / "config.json").is_file() or kills and written(out) == seen):
            time.sleep(0.005)  # at least one new line, or the beginning of the run, before the next kill
        time.sleep(rng.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 3, "the run ended before it could be killed often enough"
    finished = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (out / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_one_update_a_round_starts_from_ratio_one(tiny_directory, problems, tmp_path):
    train(*arguments(tiny_directory, problems, tmp_path / "rl", "--rounds", "1", "--updates_per_round", "1"))
    [line] = metrics_of(tmp_path / "rl")
    assert line["policy/updates"] == 1 and line["policy/clip_fraction"] == 0
    assert abs(line["policy/ratio"] - 1) < 1e-5 and abs(line["policy/kl_old"]) < 1e-8


def test_a_round_without_failures_or_without_the_step_level_has_no_branches(tiny_directory, problems, tmp_path):
    train(*arguments(tiny_directory, problems, tmp_path / "rl", "--rounds", "1", "--branches", "0"))
    [line] = metrics_of(tmp_path / "rl")
    assert line["step/prompts"] == 0 and line["step/pass_rate"] is None and line["policy/updates"] > 0


def test_a_round_where_everything_failed_trains_the_step_level_alone(tiny_directory, problems, tmp_path):
    """With a box demanded within the last token no trajectory survives; the branches still do."""
    train(*arguments(tiny_directory, problems, tmp_path / "rl", "--rounds", "1", "--box_within_last", "1"))
    [line] = metrics_of(tmp_path / "rl")
    assert line["trajectory/groups_used"] == 0 and line["step/groups_kept"] > 0 and line["policy/updates"] > 0


def test_a_run_that_trained_nothing_does_not_end_silently(tiny_directory, problems, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        config.run(train_rl.main, TrainOptions, "", arguments(
            tiny_directory, problems, tmp_path / "rl", "--rounds", "1", "--min_response_tokens", "9999", "--branches", "0"))
    assert ended.value.code == 2 and "no round had a group to train on" in capsys.readouterr().err
    assert metrics_of(tmp_path / "rl")[0]["policy/updates"] == 0


def make_run(tiny_directory: Path, problems: Path, out: Path, *more: str) -> train_rl.Run:
    return train_rl.begin(config.parse(TrainOptions, "", arguments(tiny_directory, problems, out, "--rounds", "1", *more)))


def test_a_step_whose_loss_is_not_finite_is_skipped_and_three_in_a_row_stop_the_run(tiny_directory, problems, tmp_path):
    run = make_run(tiny_directory, problems, tmp_path / "rl")
    before = [p.clone() for p in run.model.parameters()]
    bad = [Sample([1, 2, 3], [False, True, True], [-1.0, -1.0], [math.nan, -1.0], advantage=1.0)]
    assert [train_rl.optimizer_step(run, bad)["skipped"] for _ in range(2)] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="3 steps in a row"):
        train_rl.optimizer_step(run, bad)
    assert (tmp_path / "rl" / "bad_batch.jsonl").is_file()


def test_groups_are_dealt_whole_and_evenly_and_none_is_left_out(tiny_directory, problems, tmp_path):
    run = make_run(tiny_directory, problems, tmp_path / "rl", "--updates_per_round", "4")
    group = [Sample([1, 2], [False, True], [-1.0], [-1.0], advantage=a) for a in (1.0, -1.0)]
    few = train_rl.update(run, [list(group) for _ in range(3)], [list(group)], random.Random(0))
    assert few["policy/updates"] == 3, "fewer groups than updates: as many steps as groups"
    only_branches = train_rl.update(run, [], [[replace(s, is_step=True) for s in group]], random.Random(0))
    assert only_branches["policy/updates"] == 1
    assert train_rl.update(run, [], [], random.Random(0))["policy/updates"] == 0


def test_problems_come_in_a_seeded_order_and_two_copies_of_one_are_kept_apart(tiny_directory, problems, tmp_path):
    run = make_run(tiny_directory, problems, tmp_path / "rl", "--problems_per_round", "40")
    chosen = train_rl.next_problems(run)
    assert len({problem.id for problem, epoch in chosen if epoch == 0}) == 36
    assert len({(problem.id, epoch) for problem, epoch in chosen}) == 40 and run.state.drawn == 40


def test_old_log_probs_are_those_of_the_weights_that_sampled(tiny_directory, problems, tmp_path):
    run = make_run(tiny_directory, problems, tmp_path / "rl")

    async def sample() -> list:
        from thor.rollout import Tools
        from thor.sandbox import open_sandbox
        async with open_sandbox("local") as sandbox:
            return await train_rl.sample_groups(run, Tools(train_rl.build_engine(run), sandbox, run.template), 1)

    _, kept, _ = asyncio.run(sample())
    groups = train_rl.trajectory_groups(kept.groups, run.options)
    train_rl.score_old(run, groups)
    gaps = [abs(a - b) for group in groups for s in group for a, b in zip(s.old_logprobs, s.sampler_logprobs, strict=True)]
    assert gaps and max(gaps) < 2e-4


@pytest.mark.parametrize("more, message", [
    (["--samples", "1"], "samples is 1"),
    (["--branches", "1"], "branches is 1"),
    (["--top_p", "0.9"], "makes the ratio"),
    (["--temperature", "0"], "makes the ratio"),
    (["--problems", "NO_ANSWER"], "has no answer"),
    (["--problems", "none.jsonl"], "does not exist"),
    (["--lr", "1"], "lr was 0.0003, is 1.0"),
    (["--eval_every", "2"], "needs --eval_problems"),
    (["--model", "no/such"], "not a directory"),
    (["--sandbox", "http://127.0.0.1:9"], "sandbox"),
    (["--device", "gpu"], "device is 'gpu'; it must be cpu or cuda"),
    (["--suffix_tokens", "-1"], "suffix_tokens is -1"),
    (["--min_group_fraction", "2"], "min_group_fraction is 2"),
    (["--max_grad_norm", "0"], "max_grad_norm is 0.0; it must be above 0"),
])
def test_bad_input_gets_one_sentence_and_exit_code_2(trained, tiny_directory, problems, tmp_path, more, message, capsys):
    (tmp_path / "NO_ANSWER").write_text('{"id": "a", "question": "1+1", "answer": null}\n')
    given = arguments(tiny_directory, problems, trained if "lr" in message else tmp_path / "rl", "--rounds", "5",
                      "--groups_per_round", "5", "--max_passes", "2")
    more = [argument.replace("NO_ANSWER", str(tmp_path / "NO_ANSWER")) for argument in more]
    with pytest.raises(SystemExit) as ended:
        config.run(train_rl.main, TrainOptions, "", given + more)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize("program, trivial, greedy", [
    ("print(1)", True, False),
    ("print('a')", True, False),
    ("a = 3\nprint(a)", False, False),
    ("import math\nprint(math.pi)", False, False),
    ("try:\n    x = 1 / 0\nexcept:\n    print(1)", False, True),
    ("try:\n    print(x)\nexcept Exception:\n    print(1)", False, True),
    ("try:\n    print(x)\nexcept KeyError:\n    print(1)", False, False),
    ("print(1", False, False),  # as code looks that another Python, in a sandbox elsewhere, has run
])
def test_code_that_games_the_step_reward_is_recognised(program, trivial, greedy):
    assert (only_prints_constants(program), catches_everything(program)) == (trivial, greedy)


def test_ctrl_c_ends_after_the_round_and_saves(tiny_directory, problems, tmp_path):
    out = tmp_path / "rl"
    process = subprocess.Popen([sys.executable, str(ROOT / "train_rl.py"), *arguments(
        tiny_directory, problems, out, "--rounds", "50", "--save_every", "1000")], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").is_file() or not metrics_of(out):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    step = int(os.readlink(out / "latest").removeprefix("step_"))
    assert step == metrics_of(out)[-1]["step"] < 50


def test_a_round_in_bfloat16_keeps_float32_weights_and_continues_from_its_checkpoint(tiny_directory, problems, tmp_path):
    """The arithmetic and the sampler are bfloat16, on a mesh of one; what is saved is what float32 sums made."""
    more = ("--dtype", "bfloat16", "--checkpoint_layers", "True", "--updates_per_round", "2")
    for out, rounds in (("whole", ("2",)), ("halves", ("1", "2"))):
        for number in rounds:
            train(*arguments(tiny_directory, problems, tmp_path / out, "--rounds", number, *more))
    whole, halves = (metrics_of(tmp_path / out) for out in ("whole", "halves"))
    assert whole == halves and whole[1]["policy/updates"] == 2
    assert 1e-4 < whole[0]["policy/sampler_gap"] < 0.1, "two roundings of the same numbers: not equal, and not far apart"
    weights = load_file(tmp_path / "whole" / "latest" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values()), "masters are not rounded"


def test_in_bfloat16_the_sampler_has_bfloat16_weights_and_the_trainer_float32_shares(tiny_directory, problems, tmp_path):
    options = config.parse(TrainOptions, "", arguments(tiny_directory, problems, tmp_path / "rl", "--dtype", "bfloat16"))
    with open_ranks("cpu", mixed=True) as ranks:
        run = train_rl.begin(options, ranks)
        sampler = train_rl.build_engine(run).model
        assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in sampler.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("more, message", [
    (["--dtype", "float16"], "dtype is 'float16'"),
    (["--compile", "True"], "compile and offload are for --device cuda"),
    (["--offload", "True", "--device", "cuda"], "offload needs --dtype bfloat16"),
])
def test_arithmetic_that_there_is_not_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        config.parse(TrainOptions, "", ["--model", "m", "--problems", "p", "--out", "o", *more])
