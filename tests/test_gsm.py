"""Equations of worked solutions as code: hand-made steps, and real ones whose programs are run and compared."""

import asyncio
import re

import pytest
from test_smollm2 import need

from runs import smollm2
from thor.critic import check_rewrite, parse_rewrite
from thor.gsm import REASONS, actor_text, count_readings, make_critic, read_step, steps_of, value_of

STEPS = {  # step: (reasoning that stays, expression)
    "There are 18 + 126 = 144 people.": ("There are 18 + 126 = ? people.", "18 + 126"),
    "So 9 x 12 = 108 eggs": ("So 9 x 12 = ? eggs", "9 * 12"),
    "So 9 × 12 ÷ 4 = 27 eggs": ("So 9 × 12 ÷ 4 = ? eggs", "9 * 12 / 4"),
    "He was left with 72*0.5=36 pebbles.": ("He was left with 72*0.5=? pebbles.", "72 * 0.5"),
    "6 days/week * 2 weeks/month = 12 days/month": ("6 days/week * 2 weeks/month = ? days/month", "6 * 2"),
    "each serving has 20 grams/5 = 4 grams": ("each serving has 20 grams/5 = ? grams", "20 / 5"),
    "The fee is $400,000 x 8/100 = $32,000.": ("The fee is $400,000 x 8/100 = ?.", "400000 * 8 / 100"),
    "It is 100% - 20% = 80% of the quiz.": ("It is 100% - 20% = ?% of the quiz.", "100 - 20"),
    "It is 15 / 60 * 100% = 25%": ("It is 15 / 60 * 100% = ?%", "15 / 60 * 100"),
    "20% * 50 people = 10 people": ("20% * 50 people = ? people", "20 / 100 * 50"),
    "(5 + 3) * 2 = 16": ("(5 + 3) * 2 = ?", "(5 + 3) * 2"),
    "9 skeins per shawl + 4 skeins per hat = 13 skeins": ("9 skeins per shawl + 4 skeins per hat = ? skeins", "9 + 4"),
    "It costs €33 each because 11 x 3 = 33": ("It costs ? each because 11 x 3 = ?", "11 * 3"),
    "   - 73 plants × €3 per plant = €219": ("- 73 plants × €3 per plant = ?", "73 * 3"),
    "They got 7 x 2 = 14.0 eggs.": ("They got 7 x 2 = ? eggs.", "7 * 2"),
}

SKIPPED = {
    "Emma finds 7 eggs.": "no_equation",
    "The number of items is 48=48.": "not_understood",
    "Subtracting, we get 2x=58": "not_understood",
    "Thus, T = 196 - 140 = 56 balls came.": "not_understood",
    "half * 188 beetles = 94 grasshoppers": "not_understood",
    "y + 3 = 5": "not_understood",
    "2 + 3 = 5 + 1": "not_understood",
    "3 ** 4 = 81": "not_understood",
    "12 / 0 = 0": "other_result",
    "David has 17*0.5=8 tubes.": "other_result",
    "0.1 + 0.2 = 0.3": "other_result",  # Python prints 0.30000000000000004
    "2 + 2 = 4 and 3 + 3 = 6": "several_equations",
}


@pytest.mark.parametrize("step", STEPS)
def test_the_equation_becomes_code_and_its_result_a_question_mark(step):
    reading = read_step(step)
    logic, expression = STEPS[step]
    assert (reading.reason, reading.rewrite.logic, reading.rewrite.code) == ("rewritten", logic, f"print({expression})")


@pytest.mark.parametrize("step", SKIPPED)
def test_what_is_not_confirmed_stays_text_and_has_a_reason(step):
    assert read_step(step).reason == SKIPPED[step] and read_step(step).rewrite is None


@pytest.mark.parametrize("expression", ["2 ** 9", "9 // 2", "print", "a + 1", "1 +", "", "1 / 0", "007", "1(2)",
                                        "1.2.3", "__import__('os')"])
def test_nothing_but_plain_arithmetic_has_a_value(expression):
    assert value_of(expression) is None


@pytest.mark.parametrize("text", ["1 a b c d e " * 300 + "=", "1 + " * 1000 + "= 3", "1 a + " * 600 + "=",
                                  "(" * 3000 + "=", "1 / a " * 600 + "="])
def test_long_nonsense_is_read_to_its_end(text):
    """A pattern that backtracks would need years for these."""
    assert read_step(text).reason == "not_understood"


def test_the_critic_follows_the_rules_of_critics_and_repeats_itself():
    critic = make_critic(3)

    async def rewritten(step: str) -> tuple[bool, str, str]:
        rewrite = await critic.rewrite(step, None)
        assert await critic.rewrite(step, "the code failed") == rewrite
        return await critic.solvable(step), rewrite.logic, rewrite.code

    for step in STEPS:
        solvable, logic, code = asyncio.run(rewritten(step))
        rewrite = parse_rewrite(f"{logic}\n```python\n{code}\n```")
        assert solvable and check_rewrite(step, rewrite, [], min_kept=1.0, max_added=0.0) is None
    assert not any(asyncio.run(critic.solvable(step)) for step in SKIPPED)


def test_a_solution_becomes_steps_of_a_sentence_each_and_a_boxed_answer():
    solution = "First 2 + 3 = 5 eggs. Then 5 * 1.5 = 7.5 eggs.\n\n  So 7.5 - 0.5 = 7\n#### 7.0"
    assert actor_text(solution, "7") == ("First 2 + 3 = 5 eggs.\n\nThen 5 * 1.5 = 7.5 eggs.\n\nSo 7.5 - 0.5 = 7\n\n"
                                         "The answer is \\boxed{7}.")


def test_every_step_of_a_solution_is_counted_once():
    solutions = ["\n".join(STEPS), "\n".join(SKIPPED)]
    counts = count_readings(solutions)
    assert tuple(counts) == REASONS and sum(counts.values()) == sum(len(steps_of(solution)) for solution in solutions)
    assert counts["rewritten"] == len(STEPS)


def test_programs_of_real_solutions_print_what_the_solutions_say():
    need("reasoning_gym")
    rewritten = 0
    for problem in smollm2.gsm_symbolic(200, 5):
        for step in steps_of(problem["metadata"]["answer_cot"]):
            rewrite = read_step(step).rewrite
            if rewrite is None:
                continue
            printed: list[float] = []
            exec(rewrite.code, {"print": printed.append})
            told = re.findall(r"=\s?[$£€]?([\d,]*\.?\d+)", step)
            assert printed == [float(told[0].replace(",", ""))], step
            assert re.search(r"=\s?\?", rewrite.logic), step
            rewritten += 1
    assert rewritten > 400


def test_texts_belong_to_the_problems_of_the_same_seed(tmp_path, capsys):
    need("reasoning_gym")
    problems, texts = tmp_path / "problems.jsonl", tmp_path / "texts.jsonl"
    smollm2.main(smollm2.Options(problems=str(problems), texts=str(texts), num_problems=20, seed=3))
    ids = [[line.split('"')[3] for line in file.read_text().splitlines()] for file in (problems, texts)]
    assert ids[0] == ids[1] and len(ids[0]) == 20
    assert "rewritten" in capsys.readouterr().out
