"""What a model is asked in a code benchmark, and which part of what it wrote is its answer.

The rollout is the one that solves mathematics: the model may run code while it thinks. Its answer is the last fenced
Python block of its own text, whether or not that was run too; a fence that was never closed opens nothing, and a
reasoning model's block counts after </think> only. A base model that was given the beginning of a file goes on with it,
and its answer is that beginning with its lines, up to where something else begins.
"""

import io
import re

from thor.code_benchmarks import CodeProblem
from thor.data import Problem
from thor.rollout import answer_part
from thor.template import OPENING, QUESTION, code_of, cut_response
from thor.trajectory import OBSERVE, Trajectory

INSTRUCTION = """Reason step by step. To try something, write a Python block that prints the result:
```python
print(2 ** 10)
```
Its output follows in an output block, and you go on from there. Every block runs by itself: import what it needs, and \
do not use names of an earlier block. The last Python block is your answer: write the complete solution in it, with \
its imports, and print an example below it."""

TEXT_INSTRUCTION = "Answer with the complete solution, with its imports, in one Python block."

# Where a base model has finished a file of functions: lines that begin so, at the left margin, are no part of it.
AFTER_FUNCTIONS = ('"""', "'''", "```", "#", "<", "assert ", "print(", "if ")
FUTURE = re.compile(r"^from __future__ import [^\n]*\n", re.MULTILINE)


def code_instruction(style: str, max_code_rounds: int, problems: list[CodeProblem]) -> str:
    """The instruction where none is given: to complete a file in base style without code rounds, else a block."""
    if max_code_rounds:
        return INSTRUCTION
    return QUESTION if style == "base" and all(problem.completion for problem in problems) else TEXT_INSTRUCTION


def as_questions(problems: list[CodeProblem], instruction: str) -> list[Problem]:
    """What rollouts are given: nothing of the tests but the one that MBPP's task shows. No gold answer."""
    complete = instruction == QUESTION
    return [Problem(problem.id, problem.completion if complete else problem.task, None) for problem in problems]


def answer_of(problem: CodeProblem, trajectory: Trajectory) -> str | None:
    """The candidate as source, ready to be tested; None if the response has no code."""
    if problem.completion and trajectory.question == problem.completion and not trajectory.text.startswith(OPENING):
        return completed(problem.completion, trajectory.text)
    block = last_block(answer_part(trajectory.text) if trajectory.thinking else trajectory.text)
    return None if block is None else assembled(problem, block)


def last_block(text: str) -> str | None:
    """The program in the last closed Python block of the policy's own text; None if there is none or it is blank."""
    closed = [code_of(block) for block in map(_block, cut_response(text)) if block is not None]
    return closed[-1] if closed and closed[-1].strip() else None


def _block(piece: tuple[str, str]) -> str | None:
    """The fenced block at the end of a policy piece, where it has one: pieces are cut behind the closing fence."""
    kind, text = piece
    opening = re.search(rf"^{OPENING}[^\n]*\n", text, re.MULTILINE)
    closed = opening is not None and re.search(r"^[ \t]*```\Z", text[opening.end():], re.MULTILINE)
    return text[opening.start():] if kind != OBSERVE and closed else None


def assembled(problem: CodeProblem, block: str) -> str:
    """The block where it belongs: after its task's imports and helpers, or, if it is only a body, after the head."""
    if problem.completion and _is_body(block) and not _defines(block, problem.entry):
        return problem.completion + block
    first = "".join(FUTURE.findall(block))  # these have to come first
    return first + problem.context + FUTURE.sub("", block)


def completed(beginning: str, text: str) -> str:
    """The beginning of a file with a base model's lines, up to where something else begins.

    Where the beginning ends inside a function (its last line is indented), that is the next line at the left margin.
    """
    inside = beginning.rstrip().rpartition("\n")[2].startswith((" ", "\t"))
    kept = []
    for line in io.StringIO(text):  # str.splitlines would also cut at a form feed or at U+2028, inside a string
        if line.strip() and (not line[0].isspace() if inside else line.startswith(AFTER_FUNCTIONS)):
            break
        kept.append(line)
    return beginning.rstrip() + "\n" + "".join(kept)


def _is_body(block: str) -> bool:
    """Whether its first line of code is indented."""
    return next(line for line in block.splitlines() if line.strip())[0].isspace()


def _defines(block: str, name: str) -> bool:
    return re.search(rf"^(?:def|class|async def) {name}\b|^{name}\s*=", block, re.MULTILINE) is not None
