"""TIRGen's loop with a scripted Actor and Critic, and tirgen.py as its users meet it: kills, shards, one sentence."""

import asyncio
import dataclasses
import io
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

import tiny
from stub import Reply, Stub, completion
from thor import config, tries
from thor.actor_critic import LoopOptions, Tools, make_try
from thor.clients import ClientError, Completion, Request
from thor.critic import CriticOptions, LMCritic
from thor.data import Problem, read_sft
from thor.sandbox import LocalSandbox
from thor.template import Template, load_template
from thor.tirgen_text import Block, cut_steps, cut_windows, written_trajectory
from thor.toy import problems, text_solution, write_model
from thor.trajectory import ACT, OBSERVE, Execution, loss_mask
from thor.tries import Try
from tirgen import MAX_LOST_IN_A_ROW, Run, TirgenOptions, in_parallel, main

ROOT = Path(__file__).parent.parent
PROBLEM = Problem("p", "How many eggs are in the secret box?", "84")
TEMPLATE = Template(tiny.make_tokenizer(), style="base", instruction="")
STEP = "It has 12 rows of 7 eggs. 12 * 7 = 85, so 85 eggs.\n\n"  # the Actor cannot multiply
LOGIC = "It has 12 rows of 7 eggs."
REWRITE = f"{LOGIC}\n```python\nprint(12 * 7)\n```\n```output\n99\n```\n"
BLOCK = "```python\nprint(12 * 7)\n```\n```output\n84\n```\n"
LAST = "So the answer is \\boxed{84}."


class ScriptedActor:
    """Continues with the given completions in turn, the last one again and again; remembers what it was asked."""

    def __init__(self, *completions: Completion | Exception):
        self.completions = list(completions)
        self.requests: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        answer = self.completions.pop(0) if len(self.completions) > 1 else self.completions[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class FriendlySandbox:
    """Runs the tests' own programs in this process."""

    async def run(self, code: str) -> Execution:
        printed: list[str] = []
        try:
            exec(code, {"print": lambda *values: printed.append(" ".join(map(str, values)) + "\n")})
        except Exception as error:  # as a sandbox: whatever the code raises is its result
            return Execution("error", "", f"{type(error).__name__}: {error}", 0.0)
        return Execution("ok" if printed else "silent", "".join(printed), "" if printed else "(no output)", 0.0)


def stop(text: str) -> Completion:
    return Completion(text.removesuffix("\n\n"), "stop")


def eos(text: str) -> Completion:
    return Completion(text, "eos")


def language_critic(*answers: str) -> tuple[ScriptedActor, Callable[[int], LMCritic]]:
    """A Critic that is a language model with these answers, and the client that it asks."""
    client = ScriptedActor(*map(eos, answers))
    return client, lambda seed: LMCritic(client, seed, CriticOptions(), str)


def run_try(actor: ScriptedActor | None, make_critic: Callable, template: Template = TEMPLATE,
            texts: list[str] | None = None, sandbox: FriendlySandbox | None = None, number: int = 0, **options) -> Try:
    given = None if texts is None else {PROBLEM.id: texts}
    actor_template = dataclasses.replace(template, instruction="Think without code.")
    tools = Tools(LoopOptions(**options), template, actor_template, actor, make_critic, sandbox or FriendlySandbox(),
                  given)
    return asyncio.run(make_try(tools, PROBLEM, number))


def test_the_sandboxs_output_replaces_the_number_that_the_actor_had_computed_and_the_critic_had_predicted():
    actor = ScriptedActor(stop("Let us see.\n\n"), stop(STEP), eos(LAST))
    made = run_try(actor, language_critic("NO", "YES", REWRITE, "NO")[1])
    assert made.reason is None and made.trajectory.text == f"Let us see.\n\n{LOGIC}\n{BLOCK}{LAST}"
    assert made.trajectory.boxed == "84" and made.trajectory.finish == "eos"
    assert made.critic == {"steps": 3, "solvable": 1, "rewrites": 1}


def test_a_trajectory_is_encoded_once_and_the_loss_never_sees_the_output():
    made = run_try(ScriptedActor(stop(STEP), eos(LAST)), language_critic("YES", REWRITE, "NO")[1]).trajectory
    assert TEMPLATE.decode(made.response_ids) == made.text + "<eos>"
    parts = {span.kind: TEMPLATE.decode(made.response_ids[span.start:span.end]) for span in made.spans}
    assert parts[ACT].strip() == "```python\nprint(12 * 7)\n```" and parts[OBSERVE] == "\n```output\n84\n```\n"
    assert [run.stdout for run in made.executions] == ["84\n"] and loss_mask(made.spans, len(made.response_ids))[-1]
    assert made.prompt_ids == TEMPLATE.prompt_ids(PROBLEM.question), "it has the tool instruction"


def test_the_critic_sees_one_step_and_never_the_problem():
    asked, make_critic = language_critic("NO", "YES", REWRITE, "NO")
    actor = ScriptedActor(stop("First the rows.\n\n"), stop(STEP), eos(LAST))
    assert run_try(actor, make_critic).reason is None
    steps = ["First the rows.", STEP.strip(), STEP.strip(), LAST]
    assert len(asked.requests) == 4
    for request, step in zip(asked.requests, steps, strict=True):
        assert step in request.prompt and "secret box" not in request.prompt
        assert not any(other in request.prompt for other in steps if other != step)


def test_the_actor_goes_on_from_what_the_critic_has_made_of_its_steps():
    actor = ScriptedActor(stop(STEP), eos(LAST))
    run_try(actor, language_critic("YES", REWRITE, "NO")[1])
    first, second = actor.requests
    assert first.prompt.startswith("Think without code.") and second.prompt == first.prompt + f"{LOGIC}\n{BLOCK}"
    assert first.stops == second.stops == ("\n\n",) and first.seed != second.seed


def test_an_answer_whose_end_became_code_is_ended_again_by_the_actor():
    actor = ScriptedActor(eos(STEP.strip()), eos(LAST))
    made = run_try(actor, language_critic("YES", REWRITE, "NO")[1])
    assert made.trajectory.text == f"{LOGIC}\n{BLOCK}{LAST}" and made.trajectory.finish == "eos"


def test_an_endpoint_that_cannot_tell_its_stops_ends_with_an_empty_continuation():
    actor = ScriptedActor(Completion("Let us see.", "unknown"), Completion(LAST, "unknown"), Completion("", "unknown"))
    made = run_try(actor, language_critic("NO")[1]).trajectory
    assert made.text == f"Let us see.\n\n{LAST}" and made.finish == "eos"


def test_code_that_fails_is_shown_to_the_critic_which_may_try_again():
    bad = f"{LOGIC}\n```python\nprint(rows * 7)\n```"
    asked, make_critic = language_critic("YES", bad, REWRITE, "NO")
    made = run_try(ScriptedActor(stop(STEP), eos(LAST)), make_critic)
    assert BLOCK in made.trajectory.text and made.critic["refused_code_failed"] == 1
    assert "name 'rows' is not defined" in asked.requests[2].prompt and bad in asked.requests[2].prompt


@pytest.mark.parametrize("answers, reason", [
    (["Perhaps."], "no_verdict"),
    (["YES", f"{LOGIC} The answer is 84."], "no_block"),
    (["YES", REWRITE + REWRITE], "several_blocks"),
    (["YES", f"{LOGIC}\nprint(12 * 7)"], "no_block"),
    (["YES", "Hens lay eggs.\n```python\nprint(12 * 7)\n```"], "reasoning_lost"),
    (["YES", f"{LOGIC} \\boxed{{84}}\n```python\nprint(12 * 7)\n```"], "answers_problem"),
    (["YES", f"{LOGIC}\n```python\nprint(rows * 7)\n```"], "code_failed"),
    (["YES", f"{LOGIC}\n```python\nx = 12 * 7\n```"], "code_failed"),
])
def test_a_critic_that_goes_on_breaking_a_rule_costs_the_try_and_is_counted(answers, reason):
    made = run_try(ScriptedActor(stop(STEP), eos(LAST)), language_critic(*answers)[1], critic_retries=2)
    assert made.trajectory is None and made.reason == reason and made.critic[f"refused_{reason}"] == 3
    assert made.detail and STEP in made.text, "a person can look at what was said of which step"


def test_code_that_never_ends_is_a_failure_that_is_counted():
    async def both() -> Try:
        async with LocalSandbox(num_workers=1, cpu_seconds=1) as sandbox:
            tools = Tools(LoopOptions(critic_retries=0), TEMPLATE, TEMPLATE, ScriptedActor(stop(STEP)),
                          language_critic("YES", f"{LOGIC}\n```python\nwhile 12 * 7:\n    pass\n```")[1], sandbox, None)
            return await make_try(tools, PROBLEM, 0)

    made = asyncio.run(both())
    assert made.reason == "code_failed" and "TimeoutError" in made.detail


def test_what_the_sandbox_itself_loses_is_not_the_critics_fault():
    class Broken(FriendlySandbox):
        async def run(self, code: str) -> Execution:
            return Execution("infrastructure", "", "it is gone", 0.0)

    made = run_try(ScriptedActor(stop(STEP)), language_critic("YES", REWRITE)[1], sandbox=Broken())
    assert (made.reason, made.detail) == ("sandbox", "it is gone") and tries.is_missing(made)


def test_the_same_code_twice_in_a_trajectory_is_refused():
    made = run_try(ScriptedActor(stop(STEP)), language_critic("YES", REWRITE, "YES", REWRITE)[1], critic_retries=0)
    assert made.reason == "code_not_new"


def test_the_critic_is_no_longer_asked_after_the_last_code_round():
    asked, make_critic = language_critic("YES", REWRITE)
    made = run_try(ScriptedActor(stop(STEP), stop("Well.\n\n"), eos(LAST)), make_critic, max_rounds=1)
    assert made.trajectory.boxed == "84" and len(asked.requests) == 2


@pytest.mark.parametrize("completions, reason", [
    ([stop("I wonder.\n\n")], None),  # never ends
    ([stop("Well.\n\n"), Completion("", "stop")], "empty_steps"),
    ([stop("```python\nprint(1)\n```\n\n")], "actor_wrote_code"),
    ([stop("```output\n84\n```\n\n")], "actor_wrote_code"),
    ([stop("Well.\n\n"), ClientError("it answers HTTP 500 (6 tries)")], "endpoint"),
])
def test_what_an_actor_does_wrong_has_a_reason(completions, reason):
    made = run_try(ScriptedActor(*completions), language_critic("NO")[1], max_tokens=200)
    assert made.reason == reason
    if reason is None:
        assert made.trajectory.finish == "length" and made.trajectory.boxed is None
        assert 200 <= len(made.trajectory.response_ids) < 220
        assert TEMPLATE.tokenizer.eos_token_id not in made.trajectory.response_ids, "nobody ended it"


def test_an_actor_without_room_in_its_context_has_not_ended():
    made = run_try(ScriptedActor(stop("Well.\n\n"), Completion("", "length")), language_critic("NO")[1])
    assert made.trajectory.finish == "length" and made.trajectory.text == "Well.\n\n"


def test_an_output_that_would_break_out_of_its_block_cannot_be_trained_on():
    answer = f"{LOGIC}\n```python\nprint('`' * 3 + chr(10) + 'x' * 7)\n```"
    made = run_try(ScriptedActor(stop(STEP), eos(LAST)), language_critic("YES", answer, "NO")[1])
    assert made.reason == "broken_fences"
    block = Block("print(2)", Execution("ok", "2\n", "", 0.0))
    assert written_trajectory(TEMPLATE, PROBLEM, 0, "No code.", [block], ended=True) is None


def test_a_text_that_ends_with_an_output_ends_with_its_line():
    """As at inference, where the observation's newline is there before the EOS is sampled."""
    block = Block("print(2)", Execution("ok", "2\n", "", 0.0))
    made = written_trajectory(TEMPLATE, PROBLEM, 0, f"Two.\n{block.text}\n", [block], ended=True)
    observed = [span for span in made.spans if span.kind == OBSERVE]
    assert TEMPLATE.decode(made.response_ids[observed[0].start:observed[0].end]) == "\n```output\n2\n```\n"


def test_a_step_that_begins_within_a_line_keeps_its_distance():
    actor = ScriptedActor(Completion("Look:", "length"), stop(f" {STEP}"), eos(LAST))
    made = run_try(actor, language_critic("NO", "YES", REWRITE, "NO")[1])
    assert made.trajectory.text == f"Look: {LOGIC}\n{BLOCK}{LAST}"


def test_a_box_that_a_program_prints_is_no_answer():
    block = Block("print(box(84))", Execution("ok", "\\boxed{84}\n", "", 0.0))
    assert written_trajectory(TEMPLATE, PROBLEM, 0, f"{block.text}Well.", [block], ended=True).boxed is None


def test_steps_and_windows_are_the_text_and_nothing_else():
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice(["a", "b ", "\n", "\n\n", ".\n", "\\boxed{1}", "</think>"]) for _ in range(40))
        assert "".join(step.text for step in cut_steps(text, "\n\n")) == text
        assert "".join(step.text for step in cut_windows(TEMPLATE, text, 7)) == text


def test_a_written_step_with_the_answer_is_not_shown_to_the_critic():
    assert [step.ask for step in cut_steps(f"{STEP}{LAST}", "\n\n")] == [True, False]


def test_windows_end_at_the_newline_nearest_to_their_length_and_a_short_remainder_is_left_untouched():
    """Every letter is a token. Windows of 10: lines of 4 + newline end at 5, 10, 15; of 8 + newline at 9, 18."""
    fives, nines = "aaaa\n" * 5, "bbbbbbbb\n" * 3
    assert [(step.text, step.ask) for step in cut_windows(TEMPLATE, fives + "</think>\n3", 10)] == [
        ("aaaa\naaaa\n", True), ("aaaa\naaaa\n", True), ("aaaa\n", True), ("</think>\n3", False)]
    assert [(step.text, step.ask) for step in cut_windows(TEMPLATE, fives[:-1] + "</think>\n3", 10)][2:] == [
        ("aaaa</think>\n3", False)]
    assert [step.text for step in cut_windows(TEMPLATE, "<think>\n" + nines, 10)] == [
        "<think>\n", *["bbbbbbbb\n"] * 3]


def test_a_reasoning_actor_writes_all_of_its_thoughts_and_the_critic_sees_windows_of_them():
    template = dataclasses.replace(TEMPLATE, thinking=True)
    thought = f"{STEP.strip()}\nI am sure.\n"
    asked, make_critic = language_critic("YES", REWRITE)
    actor = ScriptedActor(eos(f"{thought}</think>\n{LAST}"))
    window = len(template.encode(STEP.strip() + "\n"))
    made = run_try(actor, make_critic, template, window_tokens=window).trajectory
    assert made.text == f"{LOGIC}\n{BLOCK}I am sure.\n</think>\n{LAST}" and made.boxed == "84" and made.thinking
    assert len(asked.requests) == 2 and "I am sure" not in asked.requests[0].prompt and actor.requests[0].stops == ()


def test_the_box_of_a_reasoning_model_is_read_after_its_thoughts():
    template = dataclasses.replace(TEMPLATE, thinking=True)
    made = run_try(ScriptedActor(eos(f"Or {LAST}\n</think>\nWell.")), language_critic("NO")[1], template).trajectory
    assert made.boxed is None


def test_texts_that_are_given_are_taken_in_turn_and_cut_like_sampled_ones():
    for number, word in enumerate(["One. ", "Two. ", "One. "]):
        made = run_try(None, language_critic("YES", REWRITE)[1], texts=[f"{STEP}One. {LAST}", f"{STEP}Two. {LAST}"],
                       number=number)
        assert made.trajectory.text == f"{LOGIC}\n{BLOCK}{word}{LAST}" and made.trajectory.tokens_generated == 0


def test_reasoning_that_is_cut_off_or_too_long_has_not_ended():
    template = dataclasses.replace(TEMPLATE, thinking=True)
    cut = run_try(ScriptedActor(Completion("Well, let", "length")), language_critic("NO")[1], template)
    long = run_try(None, language_critic("NO")[1], texts=[STEP + LAST], max_tokens=20)
    assert cut.trajectory.finish == long.trajectory.finish == "length"


def test_the_first_job_that_raises_ends_all_others():
    running = []

    async def wait() -> None:
        running.append(True)
        await asyncio.sleep(60)
        running.append(False)

    async def fail() -> None:
        raise ValueError("no use")

    with pytest.raises(ValueError, match="no use"):
        asyncio.run(in_parallel([wait, fail, wait], 3))
    assert running in ([True], [True, True])


def run_of(actor: ScriptedActor, **options) -> Run:
    """A run whose Actor is scripted and whose Critic never finds anything."""
    make_critic = language_critic("NO")[1]
    tools = Tools(LoopOptions(max_tokens=100), TEMPLATE, TEMPLATE, actor, make_critic, FriendlySandbox(), None)
    given = TirgenOptions(actor="m", critic="c", problems="p", out="o", **options)
    return Run(given, tools, io.StringIO(), io.StringIO(), tqdm(disable=True), set())


def test_tries_that_a_server_loses_are_counted_and_too_many_in_a_row_end_the_run():
    """One that is not lost in between starts the count again."""
    down, up = ClientError("it answers HTTP 500 (6 tries)"), eos(LAST)
    almost = [down] * (MAX_LOST_IN_A_ROW - 1)
    run = run_of(ScriptedActor(*almost, up, *almost, down), difficulty_samples=0)

    async def take(first: int, count: int) -> None:
        for number in range(first, first + count):
            await run.take(PROBLEM, number)

    asyncio.run(take(0, 2 * MAX_LOST_IN_A_ROW - 1))
    with pytest.raises(ValueError, match="32 tries in a row were lost .endpoint: it answers HTTP 500"):
        asyncio.run(take(100, 1))
    reasons = [json.loads(line).get("reason") for line in run.file.getvalue().splitlines()]
    assert reasons == ["endpoint"] * 31 + [None] + ["endpoint"] * 32


def test_the_difficulty_of_a_problem_is_measured_once_by_text_alone_when_a_try_is_right():
    wrong = eos("So \\boxed{85}.")
    actor = ScriptedActor(wrong, eos(LAST), wrong, eos(LAST), Completion("Or", "length"), eos(LAST), eos(LAST))
    run = run_of(actor, difficulty_samples=4)

    async def three() -> None:
        for number in range(3):
            await run.take(PROBLEM, number)

    asyncio.run(three())
    assert run.difficulty_file.getvalue() == '{"id": "p", "solved": 2, "drawn": 4}\n'
    measuring = actor.requests[2:6]
    assert len(actor.requests) == 7 and len({request.seed for request in measuring}) == 4
    assert {request.prompt for request in measuring} == {TEMPLATE.prompt_text(PROBLEM.question)}
    assert not any(request.stops for request in measuring)


def test_a_difficulty_that_a_server_loses_is_left_for_the_next_run():
    run = run_of(ScriptedActor(eos(LAST), ClientError("it answers HTTP 500 (6 tries)")), difficulty_samples=2)
    asyncio.run(run.take(PROBLEM, 0))
    assert run.difficulty_file.getvalue() == "" and run.unmeasured == 1 and '"correct": true' in run.file.getvalue()


# what the command does

NUM_TRIES = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The toy world: an untrained model, 40 problems, and their worked solutions by text alone."""
    directory = tmp_path_factory.mktemp("world")
    write_model(directory / "model", 0)
    drawn = problems("train", 40, 0)
    rows = [{"id": each.id, "question": each.question, "answer": each.answer, "source": each.family} for each in drawn]
    texts = [{"id": each.id, "text": text_solution(each)} for each in drawn]
    for name, lines in (("problems", rows), ("texts", texts)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    return ["--actor", str(world / "model"), "--critic", "scripted", "--problems", str(world / "problems.jsonl"),
            "--actor_texts", str(world / "texts.jsonl"), "--out", str(out), "--style", "base", "--instruction", "",
            "--tries", str(NUM_TRIES), "--difficulty_samples", "0", "--max_trivial_share", "1", "--threads", "1", *more]


def call(world: Path, out: Path, *more: str) -> None:
    main(config.parse(TirgenOptions, "", arguments(world, out, *more)))


def lines_of(path: Path) -> list[dict]:
    """Records in order of problem and try, without what a clock measured."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        for run in record.get("executions", []):
            run["seconds"] = 0.0
    return sorted(records, key=lambda record: (record["id"], record["sample"]))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    call(world, out)
    return out


def test_every_try_is_there_once_and_the_survivors_can_be_trained_on(world, whole):
    made = tries.read_tries(whole)
    assert len(made) == 40 * NUM_TRIES and all(each.right for each in made.values())
    template = load_template(world / "model", "base", "", None, False)
    data, text = read_sft(whole / "sft.jsonl", template), (whole / "sft.jsonl").read_text()
    assert len({each.id for each in data}) == len(data) == len(text.splitlines()) >= 20
    for each in data:
        assert template.decode(each.response_ids) == each.text + "<|end|>" and each.prompt_ids
        assert all(run.passed for run in each.executions) and each.executions
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    assert len(data) + len(rejected) == len(made) and all(record["reason"] for record in rejected)
    report = json.loads((whole / "funnel.json").read_text())
    assert report["stages"][-1]["survivors"] == len(data) and len(report["stages"][0]["by_source"]) == 11
    assert (whole / "funnel.png").is_file()


def test_a_run_that_is_killed_twice_loses_and_repeats_nothing(world, whole, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "tirgen.py"), *arguments(world, out, "--concurrency", "2")]
    kept = b""
    for wanted in (5, 20):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        file = out / tries.TRIES
        while not (file.is_file() and file.read_bytes().count(b"\n") >= wanted) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        written = file.read_bytes()
        assert written.startswith(kept) and wanted <= written.count(b"\n")
        kept = written[:written.rfind(b"\n") + 1]
    for name in (tries.TRIES, tries.DIFFICULTY):
        with open(out / name, "ab") as file:
            file.write(b'{"id": "half a li')
    call(world, out)
    assert (out / tries.TRIES).read_bytes().startswith(kept)
    for name in (tries.TRIES, "sft.jsonl", "rejected.jsonl"):
        assert lines_of(out / name) == lines_of(whole / name), name


def test_shards_put_together_are_the_whole_run_and_overlapping_ones_are_refused(world, whole, tmp_path, capsys):
    for index in (1, 2):
        call(world, tmp_path / f"shard{index}", "--shard", f"{index}/2")
    both = f"{tmp_path}/shard1,{tmp_path}/shard2"
    call(world, tmp_path / "all", "--merge", both)
    for name in (tries.TRIES, "sft.jsonl", "rejected.jsonl"):
        assert lines_of(tmp_path / "all" / name) == lines_of(whole / name), name
    with pytest.raises(ValueError, match="is in another directory, too"):
        call(world, tmp_path / "twice", "--merge", f"{both},{tmp_path}/shard1")
    with pytest.raises(ValueError, match="holds tries already"):
        call(world, tmp_path / "all", "--merge", both)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        call(world, tmp_path / "other", "--merge", both, "--seed", "1")


def test_filters_can_be_changed_without_making_a_try_again(world, whole, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for name in (tries.TRIES, tries.SETTINGS):
        (out / name).write_bytes((whole / name).read_bytes())
    call(world, out, "--filter_only", "--one_call_share", "1")
    assert len((out / "sft.jsonl").read_text().splitlines()) == 40
    assert (out / tries.TRIES).read_bytes() == (whole / tries.TRIES).read_bytes()
    call(world, out, "--filter_only", "--max_trivial_share", "0")
    assert 0 < len((out / "sft.jsonl").read_text().splitlines()) < 40


def test_other_settings_or_problems_are_never_mixed_into_a_directory(world, whole, tmp_path):
    before = (whole / tries.TRIES).read_bytes()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        call(world, whole, "--seed", "1")
    with pytest.raises(ValueError, match="rewrite_prompt was"):
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("Do {step}.")
        call(world, whole, "--rewrite_prompt", str(prompt))
    with pytest.raises(ValueError, match="actor_texts was"):
        texts = tmp_path / "texts.jsonl"
        texts.write_text((world / "texts.jsonl").read_text() + "\n")
        call(world, whole, "--actor_texts", str(texts))
    others = tmp_path / "others.jsonl"
    others.write_text((world / "problems.jsonl").read_text().replace("What is", "Say what is"))
    with pytest.raises(ValueError, match="another problem"):
        call(world, whole, "--problems", str(others))
    assert (whole / tries.TRIES).read_bytes() == before


def test_our_engine_as_actor_makes_the_same_tries_whether_interrupted_or_not(world, tmp_path, capsys):
    """Its untrained model solves nothing, and the funnel says so."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((world / "problems.jsonl").read_text().splitlines(keepends=True)[:4]))
    sampled = ["--actor", str(world / "model"), "--critic", "scripted", "--problems", str(few), "--style", "base",
               "--instruction", "", "--actor_instruction", "", "--tries", "2", "--max_tokens", "40", "--context", "160",
               "--threads", "1"]
    main(config.parse(TirgenOptions, "", [*sampled, "--out", str(tmp_path / "a")]))
    assert "yield: 0 of 8 tries (0.0%)" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / tries.SETTINGS).write_bytes((tmp_path / "a" / tries.SETTINGS).read_bytes())
    some = (tmp_path / "a" / tries.TRIES).read_text().splitlines(keepends=True)[3:6]
    (tmp_path / "b" / tries.TRIES).write_text("".join(some))
    main(config.parse(TirgenOptions, "", [*sampled, "--out", str(tmp_path / "b"), "--concurrency", "2"]))
    assert lines_of(tmp_path / "b" / tries.TRIES) == lines_of(tmp_path / "a" / tries.TRIES)
    main(config.parse(TirgenOptions, "", [*sampled, "--out", str(tmp_path / "b")]))
    assert "nothing is left to make" in capsys.readouterr().out


def test_over_http_what_a_server_does_wrong_is_asked_again_and_only_what_it_goes_on_doing_loses_a_try(
        world, tmp_path, capsys):
    """One server is Actor and Critic; its first answer to anything is a fault, and about one problem all are."""
    rows = [json.loads(line) for line in (world / "problems.jsonl").read_text().splitlines()[:3]]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row | {"answer": "84"}) + "\n" for row in rows))
    faults = itertools.cycle([Reply(b"garbage"), Reply(b"{}", 429, {"Retry-After": "0"}), Reply(b"", 500), Reply(None)])

    seen: set[tuple[str, int]] = set()

    def answer(number: int, body: dict) -> Reply:
        prompt, before = body["prompt"], len(seen)
        seen.add((prompt, body["seed"]))
        if len(seen) > before or rows[0]["question"] in prompt:
            return next(faults)
        if "Can a part" in prompt:
            return completion("NO" if "boxed" in prompt.rpartition("Step:")[2] else "YES", stop_reason=None)
        if "Move its computation" in prompt:
            return completion(REWRITE, stop_reason=None)
        return completion(LAST, stop_reason=None) if BLOCK in prompt else completion(STEP.strip(), stop_reason="\n\n")

    with Stub(answer) as stub:
        options = config.parse(TirgenOptions, "", [
            "--actor", stub.url, "--critic", stub.url, "--actor_tokenizer", str(world / "model"),
            "--problems", str(few), "--out", str(tmp_path / "out"), "--style", "base", "--tries", "1",
            "--difficulty_samples", "0", "--max_trivial_share", "1", "--one_call_share", "1",
            "--max_retries", "3", "--backoff", "0.01", "--concurrency", "3"])
        main(options)
    made = tries.read_tries(tmp_path / "out")
    assert [made[row["id"], 0].reason for row in rows] == ["endpoint", None, None]
    assert all(f"{LOGIC}\n{BLOCK}{LAST}" == made[row["id"], 0].trajectory.text for row in rows[1:])
    assert "endpoint 1" in capsys.readouterr().out


def test_a_run_that_is_interrupted_does_not_wait_for_its_servers(world, tmp_path):
    with Stub(lambda number, body: Reply(b"", seconds=3600.0)) as stub:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tirgen.py"), "--actor", stub.url, "--critic", stub.url, "--actor_tokenizer",
             str(world / "model"), "--problems", str(world / "problems.jsonl"), "--out", str(tmp_path / "out"),
             "--style", "base", "--timeout", "3600"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            # a shell that starts tests in the background has them ignore Ctrl-C, and what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not stub.posts and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 130 and said.endswith("interrupted; what was written is kept\n")


def test_a_try_that_was_lost_is_made_again_and_any_other_is_there_once(tmp_path):
    lost = Try("a", 0, None, "endpoint", "HTTP 500")
    dropped = Try("a", 0, None, "no_verdict", "Well.", "text", {"steps": 1})
    path = tmp_path / tries.TRIES
    path.write_text(f"{lost.to_json()}\n{dropped.to_json()}\n")
    assert tries.read_tries(tmp_path) == {("a", 0): dropped}
    assert tries.is_missing(lost) and tries.is_missing(None) and not tries.is_missing(dropped)
    path.write_text(f"{dropped.to_json()}\n{lost.to_json()}\n")
    with pytest.raises(ValueError, match="line 2: try 0 of problem 'a' has been seen before"):
        tries.read_tries(tmp_path)


def test_problems_without_an_answer_are_counted_and_not_tried(world, tmp_path, capsys):
    rows = [json.loads(line) for line in (world / "problems.jsonl").read_text().splitlines()[:3]]
    rows[1]["answer"] = None
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(world, tmp_path / "out", "--problems", str(few))
    assert "all 3, without_answer 1" in capsys.readouterr().out
    assert len(tries.read_tries(tmp_path / "out")) == 2 * NUM_TRIES


def test_a_run_that_lost_everything_does_not_end_in_silence(world, tmp_path):
    problem = json.loads((world / "problems.jsonl").read_text().splitlines()[0])["id"]
    (tmp_path / tries.TRIES).write_text(Try(problem, 0, None, "endpoint", "HTTP 500").to_json() + "\n")
    with pytest.raises(ValueError, match="all 1 tries were lost .endpoint: HTTP 500"):
        call(world, tmp_path, "--filter_only")


@pytest.mark.parametrize("more, message", [
    (["--shard", "0/2"], "--shard is '0/2'"),
    (["--shard", "3/2"], "--shard is '3/2'"),
    (["--shard", "half"], "--shard is 'half'"),
    (["--shard", "9999999/9999999"], "no problem has an answer"),
    (["--actor", "http://127.0.0.1:9"], "--actor_tokenizer"),
    (["--actor", "no/such"], "not a directory"),
    (["--critic", "scripted:nobody"], "no thor/nobody.py with a make_critic"),
    (["--critic", "scripted:model"], "no thor/model.py with a make_critic"),
    (["--critic", "MODEL"], "(its style is --critic_style): the tokenizer has no chat template"),
    (["--device", "gpu"], "device is 'gpu'; it must be cpu or cuda"),
    (["--tries", "0"], "tries is 0"),
    (["--concurrency", "0"], "concurrency is 0"),
    (["--difficulty_samples", "-1"], "difficulty_samples is -1"),
    (["--max_tokens", "0"], "max_tokens is 0"),
    (["--max_rounds", "0"], "max_rounds is 0"),
    (["--step_end", ""], "step_end is empty"),
    (["--min_kept", "2"], "min_kept is 2"),
    (["--max_trivial_share", "2"], "max_trivial_share is 2"),
    (["--temperature", "-1"], "temperature is -1"),
    (["--rewrite_prompt", "PROBLEMS"], "has no {step}"),
    (["--rewrite_prompt", "no/such"], "No such file"),
    (["--problems", "no/such"], "does not exist"),
    (["--problems", "LATIN"], "line 1: not UTF-8"),
    (["--problems", "UNKNOWN"], "no problem has an answer"),
    (["--actor_texts", "PROBLEMS"], "needs a string 'id' and a string 'text'"),
    (["--actor_texts", "ONE"], "has no text for problem"),
    (["--filter_only"], "holds no tries.jsonl"),
    (["--merge", "a", "--filter_only"], "leave --filter_only out"),
    (["--merge", "a", "--shard", "1/2"], "--shard is for making tries"),
    (["--merge", "no/such"], "settings.json is missing"),
    (["--nonsense", "1"], "nonsense"),
])
def test_bad_input_gets_one_sentence_and_exit_code_2(world, tmp_path, more, message, capsys):
    (tmp_path / "latin").write_bytes(b'{"id": "a", "question": "caf\xe9", "answer": "1"}\n')
    (tmp_path / "unknown").write_text('{"id": "a", "question": "1+1", "answer": null}\n')
    (tmp_path / "one").write_text('{"id": "a", "text": "2"}\n')
    places = {"PROBLEMS": world / "problems.jsonl", "LATIN": tmp_path / "latin", "UNKNOWN": tmp_path / "unknown",
              "ONE": tmp_path / "one", "MODEL": world / "model"}
    given = [str(places.get(argument, argument)) for argument in more]
    with pytest.raises(SystemExit) as ended:
        config.run(main, TirgenOptions, "", arguments(world, tmp_path / "out", *given))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed and printed.count("error: ") == 1


def test_every_flag_has_a_line_of_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(TirgenOptions))
