"""The scripts with --thinking, on a small Qwen3 that thinks, runs code in its thoughts and answers after them.

In order of the method: generate.py and evaluate.py, TIRGen on given thoughts, the cold start on what these wrote, RL.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import evaluate
import generate
import tirgen
import train_rl
import train_sft
from thor import config
from thor.attention import packed
from thor.data import read_trajectories
from thor.template import CLOSE_THINKING, load_template
from thor.trajectory import ACT, loss_mask
from thor.weights import load_model

pytestmark = pytest.mark.slow  # training the model takes a few seconds

STYLE = ["--thinking", "--instruction", "", "--threads", "1"]
SOLVE = [*STYLE, "--temperature", "1", "--max_response_tokens", "120", "--suffix_tokens", "6", "--samples", "2"]
THOUGHTS = "<think>\nWe look for the greatest common divisor of {a} and {b}.\nIt is {g}.\n\n</think>\n\nIt is \\boxed{{{g}}}."


def call(script, options_class: type, *arguments: object) -> None:
    """A script's main on a command line."""
    script.main(config.parse(options_class, "", list(map(str, arguments))))


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("problems") / "problems.jsonl", [
        {"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)} for a in range(4) for b in range(4)])


@pytest.fixture(scope="module")
def evaluated(thinking_directory, problems, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "scores.json"
    call(evaluate, evaluate.EvaluateOptions, "--model", thinking_directory, "--benchmark", problems, "--out", out, *SOLVE)
    return out


def test_every_answer_is_read_after_the_thoughts_and_all_code_stands_inside_them(evaluated):
    found = read_trajectories(evaluated.with_name("scores.responses.jsonl"))
    metrics = json.loads(evaluated.read_text())["metrics"]
    assert len(found) == 32 and all(each.thinking and each.finish == "eos" for each in found)
    for each in found:
        thoughts, answer = each.text.removeprefix("<think>\n").split("</think>")
        assert each.text.startswith("<think>\n") and "```" not in answer and "```python" in thoughts
        assert each.boxed == re.fullmatch(r"\s*\\boxed\{(.*)\}", answer)[1] and each.correct == (each.boxed == each.answer)
    assert metrics["avg@2"]["value"] > 0.3 and metrics["code_ratio"]["value"] == 1 > metrics["first_try_pass_rate"]["value"]
    assert metrics["imitated_outputs"]["value"] == 0


def test_logprobs_of_a_reasoning_trajectory_are_a_plain_forwards(evaluated, thinking_directory):
    model = load_model(thinking_directory)
    for each in read_trajectories(evaluated.with_name("scores.responses.jsonl"))[:6]:
        ids = torch.tensor(each.prompt_ids + each.response_ids)
        with torch.inference_mode():
            hidden = model(ids, torch.arange(len(ids)), packed([len(ids)]))
            plain = model.logits(hidden).log_softmax(-1)[:-1].gather(1, ids[1:, None])[len(each.prompt_ids) - 1:, 0]
        pairs = [(ours, theirs) for ours, theirs in zip(each.logprobs, plain.tolist(), strict=True) if ours is not None]
        assert pairs and max(abs(ours - theirs) for ours, theirs in pairs) < 1e-4


def test_a_thinking_budget_from_the_command_line_ends_the_thoughts(thinking_directory, problems, tmp_path):
    call(generate, generate.GenerateOptions, "--model", thinking_directory, "--problems", problems, "--out",
         tmp_path / "out.jsonl", "--max_thinking_tokens", 4, *SOLVE)
    found = read_trajectories(tmp_path / "out.jsonl")
    assert len(found) == 32 and all(each.text.index(CLOSE_THINKING) == len("<think>\nAdd.") for each in found)


def test_tirgen_makes_windows_of_given_thoughts_and_leaves_the_answer_to_the_actor(thinking_directory, tmp_path):
    numbers = [(12, 18, 6), (21, 14, 7), (30, 45, 5)]  # the last is wrong: no Critic mends an answer that stands there
    asked = write(tmp_path / "problems.jsonl", [
        {"id": f"{a}", "question": f"gcd {a} {b}", "answer": str(g if a < 30 else 15)} for a, b, g in numbers])
    texts = write(tmp_path / "texts.jsonl", [{"id": f"{a}", "text": THOUGHTS.format(a=a, b=b, g=g)} for a, b, g in numbers])
    call(tirgen, tirgen.TirgenOptions, "--actor", thinking_directory, "--critic", "scripted:toy", "--problems", asked,
         "--actor_texts", texts, "--out", tmp_path / "out", "--tries", 1, "--window_tokens", 70, "--difficulty_samples", 0,
         "--max_trivial_share", 1, "--one_call_share", 1, *STYLE)
    made = read_trajectories(tmp_path / "out" / "sft.jsonl")
    assert [each.boxed for each in made] == ["6", "7"] and all(each.thinking and each.correct for each in made)
    for each in made:
        thoughts = r"We look for [^\n]*\.\n```python\n.*```\n```output\n\d\n```\n\s*"
        assert re.fullmatch(rf"<think>\n{thoughts}</think>\n\nIt is .*", each.text, re.DOTALL)


def test_the_cold_start_trains_thoughts_code_and_answer_and_no_output(evaluated, thinking_directory, tmp_path):
    data = evaluated.with_name("scores.responses.jsonl")
    call(train_sft, train_sft.SftOptions, "--model", thinking_directory, "--data", data, "--out", tmp_path / "sft",
         "--epochs", 1, "--batch", 16, "--lr", 1e-4, *STYLE)
    trained = sum(sum(loss_mask(each.spans, len(each.response_ids))) for each in read_trajectories(data))
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["train/tokens"] for line in lines) == trained and lines[0]["train/loss"] < 1
    assert load_template(tmp_path / "sft" / "latest", "chat", "", None, True).prompt_text("1+1").endswith("assistant\n")


def test_rl_learns_from_reasoning_trajectories_and_branches_inside_their_thoughts(thinking_directory, problems, tmp_path):
    out = tmp_path / "rl"
    call(train_rl, train_rl.TrainOptions, "--model", thinking_directory, "--problems", problems, "--out", out, *STYLE,
         "--rounds", 1, "--problems_per_round", 12, "--samples", 6, "--branches", 6, "--updates_per_round", 2,
         "--max_response_tokens", 60, "--suffix_tokens", 6, "--max_branch_tokens", 40, "--min_response_tokens", 0,
         "--box_within_last", 20, "--min_group_fraction", 0.25, "--lr", 3e-4, "--dump_every", 1)
    [metrics] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics["policy/updates"] == 2 and metrics["trajectory/kept"] > 0 and metrics["step/kept"] > 0
    assert metrics["policy/sampler_gap_max"] < 1e-4


def test_the_model_of_these_tests_acts_before_it_answers(evaluated):
    for each in read_trajectories(evaluated.with_name("scores.responses.jsonl")):
        assert [span.kind for span in each.spans].count(ACT) == len(each.executions) >= 1
