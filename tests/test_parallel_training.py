"""The training scripts on several ranks against one: metrics, interruption, an error, a killed rank under torchrun."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import tiny
import torch
from ranks import DEADLINE, finished, start_ranks

import train_rl
import train_sft
from thor import config
from thor.parallel import Ranks, open_ranks, shard
from thor.weights import load_model

ROOT = Path(__file__).parent.parent
RL = ["--style", "base", "--instruction", "", "--problems_per_round", "6", "--samples", "4", "--branches", "4",
      "--updates_per_round", "2", "--max_response_tokens", "60", "--suffix_tokens", "6", "--max_branch_tokens", "40",
      "--min_response_tokens", "0", "--box_within_last", "0", "--min_group_fraction", "0.25", "--lr", "3e-4",
      "--nll_weight", "0.1", "--threads", "1", "--slots", "8", "--pack_tokens", "300", "--rounds", "2",
      "--eval_every", "1",
      "--groups_per_round", "3", "--max_passes", "2", "--kl_weight", "0.01", "--entropy_weight", "0.001"]


def lines_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for_lines(out: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while len(lines_of(out)) < count:
        assert time.monotonic() < deadline, f"{out} has not got {count} lines of metrics"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def rl_arguments(tiny_directory, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    problems = [{"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)} for a in range(4) for b in range(4)]
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return ["--model", str(tiny_directory), "--problems", str(path), *RL, "--eval_problems", str(path)]


def rl_rounds(size: int, arguments: list[str], out: Path) -> list[dict]:
    """The metrics of a run on so many ranks."""
    def work(result: Connection) -> None:
        train_rl.main(config.parse(train_rl.TrainOptions, "", [*arguments, "--out", str(out)]))
        result.send((True, None))

    finished(start_ranks(size, work))
    return lines_of(out)


@pytest.fixture(scope="module")
def rl_runs(rl_arguments, tmp_path_factory) -> dict[int, list[dict]]:
    """The same two rounds on one, two and four ranks, whose models are in float64."""
    directory = tmp_path_factory.mktemp("rl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rl, "load_sharded", lambda model, ranks, *_: shard(load_model(model, torch.float64), ranks))
        return {size: rl_rounds(size, rl_arguments, directory / str(size)) for size in (1, 2, 4)}


@pytest.mark.parametrize("size", [2, 4])
def test_the_metrics_of_rounds_do_not_depend_on_the_number_of_ranks(rl_runs, size):
    """What is sampled, graded, kept and branched is the same; means and sums of floats are, but for their rounding."""
    assert [len(lines) for lines in rl_runs.values()] == [2, 2, 2]
    for one, many in zip(rl_runs[1], rl_runs[size], strict=True):
        assert one["step/prompts"] > 0 and one["step/num_continued"] > 0 and one["policy/updates"] == 2
        assert many == {name: pytest.approx(value, rel=1e-9, abs=1e-12) if name.startswith("policy/") else value
                        for name, value in one.items()}


def test_in_float32_the_metrics_of_a_round_on_two_ranks_are_close_to_those_of_one(rl_arguments, tmp_path):
    """Up to the first update what is sampled is the same; the update's numbers agree to 1e-6 where this was seen."""
    [[one], [two]] = (rl_rounds(size, [*rl_arguments, "--rounds", "1"], tmp_path / str(size)) for size in (1, 2))
    assert two == {name: pytest.approx(value, rel=1e-4, abs=1e-6) if name.startswith("policy/") else value
                   for name, value in one.items()}


@pytest.fixture(scope="module")
def sft_arguments(tmp_path_factory) -> list[str]:
    """24 steps on 24 written solutions, each step in several packs, the last one short."""
    directory, rng = tmp_path_factory.mktemp("sft"), random.Random(3)
    model = tiny.make_model(directory / "model", steps=0)
    written = [tiny.write_solution(rng) for _ in range(24)]
    (directory / "data.jsonl").write_text("".join(
        json.dumps({"question": question, "response": response}) + "\n" for question, _, response in written))
    return ["--model", str(model), "--data", str(directory / "data.jsonl"), "--style", "base", "--instruction", "",
            "--epochs", "8", "--batch", "8", "--lr", "3e-3", "--micro_tokens", "150", "--threads", "1",
            "--save_every", "4",
            "--eval_share", "0.2", "--eval_every", "3", "--tensorboard", "False"]


def start_sft(arguments: list[str], out: Path) -> list[tuple]:
    """The cold start on two ranks."""
    def work(result: Connection) -> None:
        config.run(train_sft.main, train_sft.SftOptions, "", [*arguments, "--out", str(out)])
        result.send((True, None))

    return start_ranks(2, work)


@pytest.fixture(scope="module")
def undisturbed(sft_arguments, tmp_path_factory) -> Path:
    """The directory of a run on two ranks from beginning to end."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(start_sft(sft_arguments, out))
    return out


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step_and_one_process_can_go_on(
        sft_arguments, undisturbed, tmp_path):
    out = tmp_path / "run"
    started = start_sft([*sft_arguments, "--save_every", "1000"], out)
    wait_for_lines(out, 2)
    os.kill(started[1][0].pid, signal.SIGINT)
    finished(started, codes={130})
    step = lines_of(out)[-1]["step"]
    assert os.readlink(out / "latest") == f"step_{step}" != "step_24"
    train_sft.main(config.parse(train_sft.SftOptions, "", [*sft_arguments, "--out", str(out)]))
    assert [line["step"] for line in lines_of(out)] == list(range(1, 25))
    for found, expected in zip(lines_of(out), lines_of(undisturbed), strict=True):
        assert found == {name: pytest.approx(value, rel=1e-2) for name, value in expected.items()}


@pytest.mark.parametrize("who", [[1], [0], [0, 1, 2]], ids=["one rank", "the one with the store", "all ranks"])
def test_an_error_is_one_sentence_from_one_rank_and_ends_all(who, capfd):
    def main(_: train_sft.SftOptions) -> None:
        with open_ranks("cpu") as ranks:
            if ranks.rank in who:
                raise ValueError("enough is enough")
            ranks.gather(0)

    def work(_: Connection) -> None:
        config.run(main, train_sft.SftOptions, "", [])

    finished(start_ranks(3, work), codes={1, 2})
    printed = capfd.readouterr().err
    assert printed.count("error: enough is enough") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("more", [["--dump_every", "1"], ["--sandbox_log", "log"], ["--quirk", "pack_means"]])
def test_what_needs_one_process_says_so(more):
    options = config.parse(train_rl.TrainOptions, "", ["--model", "m", "--problems", "p", "--out", "o", *more])
    with pytest.raises(ValueError, match=rf"{more[0][2:]} is .* and there are 2 processes; it needs one"):
        train_rl.check_ranks(options, Ranks(0, 2))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_a_rank(script: str, arguments: list[str], out: Path, lines: int) -> None:
    """Two ranks under torchrun, of which the second is killed once there are `lines` lines of metrics."""
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
         str(ROOT / script), *arguments, "--out", str(out)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_lines(out, lines)
        os.kill(children(job.pid)[1], signal.SIGKILL)
        _, printed = job.communicate(timeout=DEADLINE)
    finally:
        for pid in children(job.pid) if job.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        job.kill()
    assert job.returncode == 0 and "exitcode: -9" in printed, printed


def test_a_rank_killed_under_torchrun_comes_back_and_the_metrics_are_those_of_an_undisturbed_run(
        sft_arguments, undisturbed, tmp_path):
    kill_a_rank("train_sft.py", sft_arguments, tmp_path, 7)
    assert os.readlink(tmp_path / "latest") == "step_24"
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_rank_killed_in_rl_comes_back_and_the_metrics_are_the_same_whoever_sampled_what(rl_arguments, tmp_path):
    rounds = [*rl_arguments, "--rounds", "5"]
    rl_rounds(2, rounds, tmp_path / "undisturbed")
    kill_a_rank("train_rl.py", rounds, tmp_path / "killed", 2)
    assert os.readlink(tmp_path / "killed/latest") == "step_5"
    found, expected = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("killed", "undisturbed"))
    assert found == expected
