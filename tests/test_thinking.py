"""The reasoning style: code inside <think>, the answer after it, budgets, windows, masks and filters, word for word.

The engine here writes what a test tells it to; tests/test_thinking_scripts.py has the trained model and the scripts.
"""

import asyncio
import dataclasses
import json

import pytest

import tiny
from generate import GenerateOptions, make_template
from test_tirgen import BLOCK, LAST, LOGIC, PROBLEM, REWRITE, STEP, ScriptedActor, eos, language_critic, run_try
from thor.data import Problem, read_sft
from thor.engine import Sequence
from thor.filters import TrajectoryFilters, trajectory_reason
from thor.reward import trajectory_reward
from thor.rollout import FailedStep, RolloutOptions, Tools, branch_group, continue_branch, failed_step, solve
from thor.sampling import Sampling
from thor.template import CLOSE_THINKING, Template
from thor.trajectory import OBSERVE, THINK, Execution, Trajectory, from_json, loss_mask, num_observations, to_json

TEMPLATE = tiny.make_template(thinking=True)
ASKED = Problem("p", "3+4", "7")
CODE, FAILS = "```python\nprint(3+4)\n```", "```python\nprint(3+x)\n```"
OUTPUT = "\n```output\n7\n```\n"


class Dictated:
    """An engine that writes the given texts, with an EOS at the end of each; nothing that is appended changes them."""

    max_tokens = 10_000

    def __init__(self, *texts: str, template: Template = TEMPLATE):
        self.left = [[*template.encode(text), template.tokenizer.eos_token_id] for text in texts]
        self.eos = template.tokenizer.eos_token_id

    def new(self, ids: list[int], key: bytes) -> Sequence:
        return Sequence(list(ids), key, [None] * len(ids), [])

    def fork(self, sequence: Sequence, key: bytes) -> Sequence:
        return Sequence(list(sequence.ids), key, list(sequence.logprobs), [])

    def truncate(self, sequence: Sequence, length: int, key: bytes) -> None:
        del sequence.ids[length:], sequence.logprobs[length:]

    def append(self, sequence: Sequence, ids: list[int]) -> None:
        sequence.ids += ids
        sequence.logprobs += [None] * len(ids)

    def free(self, sequence: Sequence) -> None:
        pass

    async def sample(self, sequence: Sequence, sampling: Sampling, max_new_tokens: int, stop=None) -> str:
        for _ in range(max_new_tokens):
            token = self.left[0].pop(0)
            self.left = self.left if self.left[0] else self.left[1:]
            sequence.ids.append(token)
            sequence.logprobs.append(-1.0)
            if token == self.eos:
                return "eos"
            if stop is not None and stop(token):
                return "stop"
        return "length"


class Prints:
    """A sandbox in which what has no name in it prints the same, whatever it is."""

    def __init__(self, printed: str = "7"):
        self.printed = printed

    async def run(self, code: str) -> Execution:
        if "x" in code:
            return Execution("error", "", "NameError: name 'x' is not defined", 0.0)
        return Execution("ok", f"{self.printed}\n", "", 0.0)


def written(*texts: str, template: Template = TEMPLATE, printed: str = "7", **budgets) -> Trajectory:
    """The trajectory of a model that writes `texts`; a retry goes on with the next of them."""
    engine = Dictated(*texts, template=template)
    tools = Tools(engine, Prints(printed), template)
    sequence = engine.new(template.prompt_ids(ASKED.question), b"")
    return asyncio.run(solve(tools, ASKED, 0, sequence, RolloutOptions(**budgets)))


def text_of(trajectory: Trajectory, trained: bool, template: Template = TEMPLATE) -> str:
    """The text of the tokens that are trained, or of the others."""
    mask = loss_mask(trajectory.spans, len(trajectory.response_ids))
    return template.decode([token for token, flag in zip(trajectory.response_ids, mask, strict=True) if flag == trained])


# Prompts

def test_thinking_leaves_the_turn_to_the_model_and_without_it_the_prompt_closes_an_empty_think():
    turn = "<|im_start|>user\n3+4<|im_end|>\n<|im_start|>assistant\n"
    assert TEMPLATE.prompt_text("3+4") == turn
    assert tiny.make_template(thinking=True).is_thinking(turn)
    plain = dataclasses.replace(TEMPLATE, thinking=False)
    assert plain.prompt_text("3+4") == turn + "<think>\n\n</think>\n\n"
    assert not plain.is_thinking(plain.prompt_text("3+4"))


def always_thinks() -> Template:
    """A model whose prompt opens the <think>, whatever is asked."""
    tokenizer = tiny.make_tokenizer(thinking=True)
    tokenizer.chat_template = tiny.ALWAYS_THINKS
    return Template(tokenizer, "chat", instruction="")


def test_a_prompt_that_opens_think_makes_a_reasoning_turn_and_a_question_about_it_does_not():
    assert always_thinks().is_thinking(always_thinks().prompt_text("3+4"))
    plain = dataclasses.replace(TEMPLATE, thinking=False)
    base = Template(tiny.make_tokenizer(), "base", instruction="")
    for template in (plain, base):
        assert not template.is_thinking(template.prompt_text("What does <think> mean?"))


@pytest.mark.parametrize("response", ["<think>\nAdd.\n</think>\n\n7", "Add.\n</think>\n\n7"])
def test_think_is_opened_once_by_the_prompt_or_by_the_response(response, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"question": "3+4", "response": response}) + "\n")
    base = Template(tiny.make_tokenizer(), "base", instruction="", thinking=True)
    for template in (TEMPLATE, always_thinks(), base):
        [record] = read_sft(tmp_path / "sft.jsonl", template)
        text = template.decode(record.prompt_ids + record.response_ids[:-1])
        assert text.count("<think>") == 1 and text.endswith("<think>\nAdd.\n</think>\n\n7") and record.thinking


def test_a_thinking_budget_without_a_reasoning_turn_is_refused(tmp_path):
    for thinking in (True, False):
        tiny.make_tokenizer(thinking).save_pretrained(tmp_path / str(thinking))
    budget = GenerateOptions(model=str(tmp_path / "False"), style="base", max_thinking_tokens=9)
    with pytest.raises(ValueError, match="max_thinking_tokens is 9, but no reasoning turn is asked for"):
        make_template(budget)
    assert make_template(dataclasses.replace(budget, model=str(tmp_path / "True"), style="chat", thinking=True))


# Rollouts

def test_code_runs_inside_think_and_the_box_counts_only_after_it():
    solution = f"<think>\nOr \\boxed{{1}}.\n{CODE}So \\boxed{{2}}.\n</think>\n\nIt is \\boxed{{7}}."
    found = written(solution)
    assert found.text == solution.replace(CODE, CODE + OUTPUT) and found.thinking
    assert (found.boxed, found.finish, [run.outcome for run in found.executions]) == ("7", "eos", ["ok"])
    assert written(f"<think>\n{CODE}So \\boxed{{7}}.\n</think>\n\nSeven.").boxed is None
    assert written("<think>\nSo \\boxed{7}.").boxed is None, "it never ended its thoughts"
    assert written("<think>\n</think>\nIt is \\boxed{1}.\n<think>\n</think>\nNo, \\boxed{7}.").boxed == "7"


def test_a_think_that_a_program_writes_or_prints_ends_no_thoughts():
    program = "```python\nprint('</think>')\n```"
    for solution in (f"<think>\n{program}So \\boxed{{1}}.", f"<think>\n{CODE}So \\boxed{{1}}."):
        assert written(solution, printed="</think>").boxed is None


def test_the_thinking_budget_counts_response_tokens_and_lets_the_model_answer():
    thoughts = "<think>\n" + "a" * 30
    found = written(thoughts + "\\boxed{7}", max_thinking_tokens=20)
    assert found.text == f"<think>\n{'a' * 18}{CLOSE_THINKING}{'a' * 12}\\boxed{{7}}" and found.boxed == "7"
    assert text_of(found, trained=False) == CLOSE_THINKING and num_observations(found) == 0
    assert [span.kind for span in found.spans] == [THINK, OBSERVE, THINK]
    assert found.logprobs.count(None) == len(TEMPLATE.close_thinking_ids)


def test_the_thinking_budget_bounds_no_answer_and_no_thoughts_that_ended_in_time():
    solution = "<think>\nAdd.\n</think>\n\n" + "a" * 40 + "\\boxed{7}"
    assert written(solution, max_thinking_tokens=len(TEMPLATE.encode("<think>\nAdd.\n</think>\n\n"))).text == solution
    assert written(solution, max_thinking_tokens=len(TEMPLATE.encode("<think>\nAdd.\n"))).text.startswith(
        "<think>\nAdd.\n" + CLOSE_THINKING)
    plain = dataclasses.replace(TEMPLATE, thinking=False)
    assert CLOSE_THINKING not in written("a" * 40, template=plain, max_thinking_tokens=5).text


def test_an_output_with_a_closed_think_does_not_lift_the_budget():
    found = written(f"<think>\n{CODE}{'a' * 40}\\boxed{{7}}", printed="</think>", max_thinking_tokens=40)
    forced = TEMPLATE.close_thinking_ids
    assert found.response_ids[40:40 + len(forced)] == forced and found.boxed == "7"


def test_a_budget_that_an_output_overruns_is_spent_at_once():
    budget = len(TEMPLATE.encode(f"<think>\n{CODE}")) + 2
    found = written(f"<think>\n{CODE}\\boxed{{7}}", max_thinking_tokens=budget)
    assert found.text == f"<think>\n{CODE}{OUTPUT}{CLOSE_THINKING}\\boxed{{7}}" and found.boxed == "7"


def test_a_dropped_attempt_costs_nothing_of_the_thinking_budget():
    attempt = f"Again.\n{FAILS}"
    budget = len(TEMPLATE.encode(f"<think>\nAgain.\n{CODE}{OUTPUT}")) + 3
    engine_texts = (f"<think>\n{attempt}Again.\n{CODE}aaaaaa\\boxed{{7}}",)
    found = written(*engine_texts, max_thinking_tokens=budget, suffix_tokens=len(TEMPLATE.encode("Again.\n")))
    assert found.text == f"<think>\nAgain.\n{CODE}{OUTPUT}aaa{CLOSE_THINKING}aaa\\boxed{{7}}"
    assert [TEMPLATE.decode(dropped.response_ids) for dropped in found.attempts] == [attempt]


def test_no_room_for_the_words_that_close_the_thoughts_is_a_length():
    found = written("<think>\n" + "a" * 30, max_thinking_tokens=20, max_response_tokens=25)
    assert (found.finish, found.boxed, len(found.response_ids)) == ("length", None, 20)


def test_a_reasoning_trajectory_survives_its_file():
    solution = f"<think>\nAgain.\n{FAILS}Again.\n{CODE}{'a' * 60}\\boxed{{7}}"
    found = written(solution, max_thinking_tokens=50, suffix_tokens=7)
    assert found.attempts and found.thinking and from_json(to_json(found)) == found


# Branches

def failed_in(text: str, texts: list[str]) -> tuple[Tools, FailedStep, RolloutOptions]:
    """A training rollout that ended in a failed step, with an engine that goes on with `texts`."""
    options = RolloutOptions(max_corrections=0, stop_at_failure=True, suffix_tokens=len(TEMPLATE.encode("Again.\n")))
    engine = Dictated(text, *texts)
    tools = Tools(engine, Prints(), TEMPLATE)
    sequence = engine.new(TEMPLATE.prompt_ids(ASKED.question), b"")
    source = asyncio.run(solve(tools, ASKED, 0, sequence, options))
    engine.left = engine.left[-len(texts):]  # what the failed rollout would have written is gone
    return tools, failed_step(source, sequence, options), options


def branches_in(tools: Tools, failed: FailedStep, options: RolloutOptions, count: int) -> list[Trajectory]:
    """`count` branches, one after the other."""
    async def grow() -> list[Trajectory]:
        return await branch_group(tools, failed, count, 100, options, asyncio.Semaphore(1))

    return asyncio.run(grow())


def test_a_branch_inside_think_is_one_step_and_one_that_leaves_it_has_no_code():
    grown = ["Again.\n</think>\n\n\\boxed{7}", f"Again.\n{CODE}"]
    tools, failed, options = failed_in(f"<think>\nAdd.\nAgain.\n{FAILS}", grown)
    left, ran = branches_in(tools, failed, options, 2)
    assert TEMPLATE.decode(ran.prompt_ids).endswith("<think>\nAdd.\n") and TEMPLATE.decode(ran.response_ids) == grown[1]
    assert (ran.finish, ran.executions[0].passed, ran.thinking) == ("rounds", True, True)
    assert (left.finish, left.executions) == ("eos", []) and all(loss_mask(ran.spans, len(ran.response_ids)))


@pytest.mark.parametrize("before, after", [("<think>\nAdd.\n", "</think>\n\nSo \\boxed{7}."),
                                           ("<think>\nAdd.\n</think>\n\n", "So \\boxed{7}.")])
def test_where_a_branch_leads_is_read_after_think_also_if_that_was_closed_before(before, after):
    tools, failed, options = failed_in(f"{before}Again.\n{FAILS}", [f"Again.\n{CODE}"])
    [branch] = branches_in(tools, failed, options, 1)
    tools.engine.left = Dictated(after).left
    assert asyncio.run(continue_branch(tools, failed, branch, options)).boxed == "7"


# Filters of RL

@pytest.mark.parametrize("solution, within, reason", [
    (f"<think>\n{CODE}</think>\n\n\\boxed{{7}}", 20, None),
    (f"<think>\n{CODE}</think>\n\n\\boxed{{7}}{'a' * 30}", 20, "no_box_at_end"),
    (f"<think>\n{CODE}So \\boxed{{7}}.\n</think>\n\nSo.", 20, "no_box_at_end"),
    (f"<think>\n{CODE}So \\boxed{{7}}.\n", 20, "no_box_at_end"),
    (f"<think>\n{CODE}So \\boxed{{7}}.\n", 0, None),  # a wrong answer, but nothing to remove
    (f"<think>\n{FAILS}</think>\n\n\\boxed{{7}}", 20, "failed_execution")])
def test_rl_keeps_a_reasoning_trajectory_whose_box_stands_at_the_end_of_its_answer(solution, within, reason):
    found = written(solution, max_corrections=0)
    filters = TrajectoryFilters(min_response_tokens=0, box_within_last=within)
    assert trajectory_reason(found, filters, TEMPLATE.decode) == reason


def test_only_the_answer_after_think_earns_the_reward():
    right = written(f"<think>\n{CODE}</think>\n\n\\boxed{{7}}")
    thought = written(f"<think>\n{CODE}\\boxed{{7}}\n</think>\n\n")
    for found in (right, thought):
        found.correct = found.boxed == found.answer
    assert (trajectory_reward(right), trajectory_reward(thought)) == (1.0, 0.0)


# Cold start

def test_thoughts_code_and_answer_of_a_record_are_trained_with_their_tags_and_the_end_of_turn_but_no_output(tmp_path):
    response = f"<think>\nAdd.\n{CODE}{OUTPUT}Again.\n{CODE}{OUTPUT}</think>\n\nSo \\boxed{{7}}."
    records = [{"question": "3+4", "response": response},
               {"messages": [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": response}]}]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in read_sft(tmp_path / "sft.jsonl", TEMPLATE):
        assert text_of(record, trained=True) == response.replace(OUTPUT, "") + "<|im_end|>"
        assert text_of(record, trained=False) == OUTPUT * 2 and record.thinking
        assert record.prompt_ids == TEMPLATE.prompt_ids("3+4") and from_json(to_json(record)) == record


@pytest.mark.parametrize("thinking, response, said", [
    (True, "Add. \\boxed{7}", "line 1: the response closes no <think>"),
    (False, "<think>\nAdd.\n</think>\n\n7", "line 1: the response opens a <think> after a prompt in which thinking is off")])
def test_a_record_of_the_other_style_is_one_sentence(thinking, response, said, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"question": "3+4", "response": response}) + "\n")
    with pytest.raises(ValueError, match=said):
        read_sft(tmp_path / "sft.jsonl", dataclasses.replace(TEMPLATE, thinking=thinking))


# TIRGen

def test_a_model_whose_prompt_opens_think_is_a_reasoning_actor_without_being_asked():
    actor = ScriptedActor(eos(f"{STEP.strip()}\nSure.\n</think>\n{LAST}"))
    template = always_thinks()
    asked, make_critic = language_critic("YES", REWRITE)
    window = len(template.encode(STEP.strip() + "\n"))
    made = run_try(actor, make_critic, template, window_tokens=window).trajectory
    assert made.text == f"{LOGIC}\n{BLOCK}Sure.\n</think>\n{LAST}" and made.boxed == "84" and made.thinking
    assert len(actor.requests) == 1 and actor.requests[0].stops == () and len(asked.requests) == 2


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_given_thoughts_are_windows_too_and_open_their_think_once(opening):
    for template in (TEMPLATE, always_thinks()):
        _, make_critic = language_critic("YES", REWRITE)
        window = len(template.encode(STEP.strip() + "\n"))
        made = run_try(None, make_critic, template, texts=[f"{opening}{STEP.strip()}\nSure.\n</think>\n{LAST}"],
                       window_tokens=window).trajectory
        whole = template.prompt_text(PROBLEM.question) + made.text
        assert whole.endswith(f"<think>\n{LOGIC}\n{BLOCK}Sure.\n</think>\n{LAST}") and whole.count("<think>") == 1
