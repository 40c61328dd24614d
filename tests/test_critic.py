"""The Critic: what it is asked, how its answers are parsed, and which of its rewrites are refused."""

import asyncio

import pytest

from thor.clients import Completion, Request
from thor.critic import (FAULTS, REWRITE_PROMPT, SOLVABLE_PROMPT, CriticOptions, LMCritic, Rewrite, Unusable,
                         check_rewrite, computes, kept_and_added, parse_rewrite, parse_verdict, request_seed)

STEP = "The box holds 12 rows of 7 eggs. 12 * 7 = 84, so there are 84 eggs."
GOOD = "The box holds 12 rows of 7 eggs.\n```python\nprint(12 * 7)\n```\n"


class ScriptedClient:
    """Answers with the given texts in turn and remembers what it was asked."""

    template = None

    def __init__(self, *answers: str):
        self.answers = list(answers)
        self.requests: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        return Completion(self.answers.pop(0), "eos")


def fault_of(text: str, earlier: tuple[str, ...] = ()) -> str | None:
    """The rule that a Critic's whole answer about STEP breaks, by parsing or by checking it."""
    try:
        return check_rewrite(STEP, parse_rewrite(text), earlier, 0.6, 0.2)
    except Unusable as unusable:
        return unusable.fault


@pytest.mark.parametrize("text, verdict", [
    ("YES", True), (" yes.", True), ("**Yes**, there is a product.", True), ("NO", False), ("no\nBecause", False)])
def test_a_verdict_is_its_first_word(text, verdict):
    assert parse_verdict(text) is verdict


@pytest.mark.parametrize("text", ["", "Maybe", "Yesterday", "I would say YES", "Nothing", "84"])
def test_anything_but_yes_or_no_is_no_verdict(text):
    with pytest.raises(Unusable) as refused:
        parse_verdict(text)
    assert refused.value.fault == "no_verdict" and refused.value.said == text


@pytest.mark.parametrize("text, fault", [
    (GOOD, None),
    (GOOD.replace("python", "py"), None),
    (GOOD + "```output\n84\n```\n", None),
    ("```python\nprint(12 * 7)\n```", "reasoning_lost"),
    ("The box holds 12 rows of 7 eggs, 84 in all.", "no_block"),
    ("The box holds 12 rows of 7 eggs.\nprint(12 * 7)", "no_block"),  # forgot the fence
    ("The box holds 12 rows of 7 eggs.\n```python\nprint(12 * 7)", "no_block"),  # never closed
    ("The box holds 12 rows of 7 eggs. ```python print(12 * 7)```", "no_block"),
    (GOOD + GOOD, "several_blocks"),
    ("```\n12 rows\n```\n" + GOOD, "several_blocks"),
    ("The box holds 12 rows of 7 eggs.\n```python\n\n```", "empty_code"),
    (GOOD + "So there are 84 eggs.", "text_after_code"),
    (GOOD + "```output\n84\n```\nSo there are 84 eggs.", "text_after_code"),
    (GOOD.replace("The box holds 12 rows of 7 eggs.", "Twelve times seven."), "reasoning_lost"),
    (GOOD.replace("eggs.", "eggs. We must now find how many were broken on their way."), "reasoning_added"),
    (GOOD.replace("7 eggs", "8 eggs"), "numbers_changed"),
    (GOOD.replace("eggs.", "eggs. 84 eggs, so \\boxed{84}"), "answers_problem"),
    (GOOD.replace("12 * 7)", "'\\\\boxed{' + str(12 * 7))"), "answers_problem"),
    (GOOD.replace("12 * 7)", "84)"), "nothing_computed"),
])
def test_each_rule_is_broken_by_a_text_of_its_own(text, fault):
    assert fault_of(text) == fault and (fault is None or fault in FAULTS)


def test_code_that_was_written_before_is_not_new():
    assert fault_of(GOOD, earlier=("print(12 * 7)",)) == "code_not_new"
    assert check_rewrite("We run print(12 * 7) in our head.", Rewrite("We run in our head.", "print(12 * 7)"), (), 0.6,
                         0.2) == "code_not_new"


def test_a_step_with_a_box_may_keep_it():
    step = "So we add 3 + 4 = 7 and answer \\boxed{7}."
    kept = Rewrite("So we add and answer \\boxed{7}.", "print(3 + 4)")
    assert check_rewrite(step, kept, (), 0.6, 0.2) is None


def test_a_fence_inside_the_code_would_end_it_early():
    code = 'print("""\n```\n""" * 2)'
    assert check_rewrite(STEP, Rewrite("The box holds 12 rows of 7 eggs.", code), (), 0.6, 0.2) == "several_blocks"


@pytest.mark.parametrize("step, logic, kept, added", [
    ("We add the apples.", "We add the apples.", 1.0, 0.0),
    ("We add the apples.", "", 0.0, 0.0),
    ("12 x 7 = 84", "", 1.0, 0.0),  # a bare equation has no words that could be kept
    ("$\\frac{12}{7} \\times 7$", "", 1.0, 0.0),  # LaTeX commands are no words
    ("We add the apples.", "the apples We add", 0.5, 0.5),  # order counts
    ("We add the apples.", "WE ADD THE APPLES and pears", 1.0, 2 / 6),
])
def test_what_is_kept_and_added_is_counted_in_words_in_their_order(step, logic, kept, added):
    assert kept_and_added(step, logic) == (pytest.approx(kept), pytest.approx(added))


@pytest.mark.parametrize("code, expected", [
    ("print(84)", False), ("x = 84\nprint(f'{x} eggs')", False), ("print(12 * 7)", True), ("print(sum([1, 2]))", True),
    ("import math\nprint(math.pi)", True), ("print(", True)])  # the last is for the sandbox to fail
def test_code_that_only_prints_constants_computes_nothing(code, expected):
    assert computes(code) is expected


def test_the_worked_examples_of_our_prompts_keep_our_own_rules():
    answer = REWRITE_PROMPT.partition("Rewritten:\n")[2].partition("\nStep:")[0]
    assert STEP in SOLVABLE_PROMPT and STEP in REWRITE_PROMPT and fault_of(answer) is None


def test_the_critic_is_asked_about_the_step_and_nothing_else():
    client = ScriptedClient("YES", GOOD)
    critic = LMCritic(client, 5, CriticOptions(), str)
    assert asyncio.run(critic.solvable(STEP)) is True
    assert asyncio.run(critic.rewrite(STEP, None)) == Rewrite("The box holds 12 rows of 7 eggs.", "print(12 * 7)")
    assert [request.prompt for request in client.requests] == [
        SOLVABLE_PROMPT.replace("{step}", STEP), REWRITE_PROMPT.replace("{step}", STEP)]


def test_a_second_answer_is_asked_for_with_the_first_one_and_what_was_wrong_with_it():
    client = ScriptedClient("no code", GOOD)
    critic = LMCritic(client, 5, CriticOptions(), str)
    with pytest.raises(Unusable):
        asyncio.run(critic.rewrite(STEP, None))
    asyncio.run(critic.rewrite(STEP, FAULTS["no_block"]))
    first, second = (request.prompt for request in client.requests)
    assert second.startswith(first) and "no code\n" in second and FAULTS["no_block"] in second


def test_every_question_has_noise_of_its_own_that_follows_from_the_seed():
    def seeds(seed: int) -> list[int]:
        client = ScriptedClient("YES", "NO")
        critic = LMCritic(client, seed, CriticOptions(), str)
        asyncio.run(critic.solvable(STEP))
        asyncio.run(critic.solvable(STEP))
        return [request.seed for request in client.requests]

    assert seeds(5) == seeds(5) and len(set(seeds(5) + seeds(6))) == 4
    assert 0 <= request_seed(5, "a") < 2**63


def test_the_thoughts_of_a_critic_that_thinks_first_are_no_part_of_its_answer():
    critic = LMCritic(ScriptedClient("<think>NO, or\n```python\n1\n```\n</think>\n\nYES"), 5, CriticOptions(), str)
    assert asyncio.run(critic.solvable(STEP)) is True


def test_a_step_that_leaves_no_room_for_an_answer_is_no_missing_verdict():
    class Full(ScriptedClient):
        async def complete(self, request: Request) -> Completion:
            return Completion("", "length")

    for question in (LMCritic(Full(), 5, CriticOptions(), str).solvable(STEP),
                     LMCritic(Full(), 5, CriticOptions(), str).rewrite(STEP, None)):
        with pytest.raises(Unusable) as refused:
            asyncio.run(question)
        assert refused.value.fault == "too_long"


def test_a_prompt_can_be_changed_but_not_without_the_step():
    client = ScriptedClient("YES")
    asyncio.run(LMCritic(client, 5, CriticOptions("Code for {step}?"), "<{}>".format).solvable(STEP))
    assert client.requests[0].prompt == f"<Code for {STEP}?>"
    with pytest.raises(ValueError, match="rewrite_prompt has no {step}"):
        CriticOptions(rewrite_prompt="Rewrite it.")
    with pytest.raises(ValueError, match="verdict_tokens is 0"):
        CriticOptions(verdict_tokens=0)
