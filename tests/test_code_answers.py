"""Which part of a response is the answer, in each style, and what it is put together with."""

import pytest
from code_records import CASES

from thor.code_answers import INSTRUCTION, TEXT_INSTRUCTION, answer_of, as_questions, code_instruction, completed, last_block
from thor.code_benchmarks import FORMATS, CodeProblem, format_of
from thor.template import QUESTION
from thor.trajectory import Trajectory

PROBLEMS = {name: FORMATS[format_of(case.record, name)][1](case.record, name) for name, case in CASES.items()}
MEAN = PROBLEMS["humaneval+"]


def block(code: str) -> str:
    return f"```python\n{code}\n```\n"


def response(text: str, problem: CodeProblem = MEAN, thinking: bool = False, complete: bool = False) -> Trajectory:
    question = problem.completion if complete else problem.task
    return Trajectory(problem.id, 0, question, None, [], text=text, thinking=thinking)


@pytest.mark.parametrize("text, code", [
    (block("a = 1"), "a = 1\n"),
    ("So\n" + block("a = 1") + "and\n" + block("b = 2") + "done", "b = 2\n"),                          # the last one
    (block("print(1)") + "```output\n1\n```\n" + block("b = 2") + "```output\n\n```\nThat is it.", "b = 2\n"),  # it was run, too
    (block("a = 1") + "```output\n```python\nb = 2\n```\n", "a = 1\n"),                                  # what was printed is not it
    (block("a = 1") + "```\nb = 2\n```\n", "a = 1\n"),                                                   # another fence
    (block("a = 1") + "```python\nb = 2", "a = 1\n"),                                                    # never closed
    ("```py\na = 1\n```", "a = 1\n"),
    ("```python\ns = '''\n``` \n'''\n```", "s = '''\n"),                                                 # a fence is a fence
    ("```python\nif x:\n    a = 1\n    ```", "if x:\n    a = 1\n"),
    ("```python\n```", None), ("```python\n \n```", None), ("a = 1", None), ("", None), ("text ```python\na\n```", None),
])
def test_the_answer_is_the_last_closed_python_block_of_the_models_own_text(text, code):
    assert last_block(text) == code


def test_a_reasoning_models_answer_comes_after_its_thinking():
    inside, after = block("def weighted_mean(v, w): return 1"), block("def weighted_mean(v, w): return 2")
    assert answer_of(MEAN, response(f"<think>{inside}</think>", thinking=True)) is None
    assert answer_of(MEAN, response(f"<think>\n{inside}", thinking=True)) is None
    assert "return 2" in answer_of(MEAN, response(f"<think>\n{inside}</think>\n{after}", thinking=True))


def test_a_function_gets_the_imports_of_its_task_and_a_body_its_head():
    whole = "def weighted_mean(values: List[float], weights):\n    return 0.0\n"
    assert answer_of(MEAN, response(block(whole))) == "from typing import List\n\n\n" + whole + "\n"
    assert answer_of(MEAN, response(block("    return 0.0"))) == MEAN.completion + "    return 0.0\n"
    helper = "    x = 1\ndef weighted_mean(values, weights): return 0\n"
    assert answer_of(MEAN, response(block(helper))).startswith(MEAN.context + "    x")  # it has a head, wherever its margin is


def test_imports_from_the_future_stay_first():
    problem = PROBLEMS["livecodebench-stdin"]
    source = answer_of(problem, response(block("from __future__ import annotations\nprint(1)"), problem))
    compile(source, "<answer>", "exec")
    assert source.startswith("from __future__") and source.endswith("print(1)\n")


BODY = "    total = 1.0\n\n    # a comment\n    return total\n"


@pytest.mark.parametrize("after", ["", "\n\ndef other():\n    pass\n", "\nprint(weighted_mean([], []))\n", "```\nThat is it.", "# Test\n",
                                   "if __name__ == '__main__':\n    main()\n", "Problem: another\n"])
def test_a_completed_function_ends_where_something_else_begins(after):
    source = answer_of(MEAN, response(BODY + after, complete=True))
    assert source.rstrip() == (MEAN.completion + BODY).rstrip()


@pytest.mark.parametrize("after", ["", '"""\nAnother task\n"""\n', "assert pairs([], 1) == set()\n", "print(pairs([1], 1))\n", "```\n",
                                   "if __name__ == '__main__':\n    main()\n", "# Test\n"])
def test_a_completed_file_keeps_its_functions_and_ends_at_its_tests(after):
    written = "import math\n\nHALF = 0.5\n\ndef helper(x):\n    return x\n\ndef pairs(numbers, total):\n    return set()\n"
    problem = PROBLEMS["mbpp"]
    source = answer_of(problem, response(written + after, problem, complete=True))
    assert source.rstrip() == (problem.completion + written).rstrip()


def test_a_base_model_that_answers_in_a_block_is_read_as_one_that_was_asked_to():
    text = block("def weighted_mean(v, w):\n    return 2")
    assert answer_of(MEAN, response(text, complete=True)) == answer_of(MEAN, response(text))


def test_one_newline_lies_between_a_beginning_and_what_follows():
    assert completed("def f():\n    '''d'''\n\n", "    return 1") == "def f():\n    '''d'''\n    return 1"


def test_a_line_separator_in_a_string_ends_no_line_of_code():
    begun = "def f():\n    '''d'''\n"
    assert completed(begun, "    return 'a\u2028b'\nprint(f())\n") == begun + "    return 'a\u2028b'\n"


@pytest.mark.parametrize("style, rounds, name, instruction", [
    ("chat", 10, "humaneval+", INSTRUCTION), ("base", 10, "humaneval+", INSTRUCTION), ("chat", 0, "humaneval+", TEXT_INSTRUCTION),
    ("base", 0, "humaneval+", QUESTION), ("base", 0, "mbpp", QUESTION), ("base", 0, "livecodebench-stdin", TEXT_INSTRUCTION)])
def test_a_base_model_without_code_rounds_goes_on_with_a_file_and_all_others_answer_in_a_block(style, rounds, name, instruction):
    problem = PROBLEMS[name]
    assert code_instruction(style, rounds, [problem]) == instruction
    (question,) = as_questions([problem], instruction)
    assert question.question == (problem.completion if instruction == QUESTION else problem.task) and question.answer is None
