"""Worked solutions of word problems as an Actor's reasoning; a scripted Critic that turns their equations into code.

reasoning-gym's gsm_symbolic explains its answers in lines like "There are 18 + 126 = 144 people left." An equation of a
step becomes `print(18 + 126)`, its result a question mark. What is not understood stays text. Invariant: an equation is
rewritten only if Python prints the very number that the step states, so what follows in the text stays true.
"""

import re
from collections import Counter
from dataclasses import dataclass

from thor.critic import Rewrite

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
MONEY = "[$£€¥₹]?"
AMOUNT = rf"{MONEY}{NUMBER}%?"
UNIT = r"(?:\s?/\s?[A-Za-z]+|\s(?!x\b)[A-Za-z][A-Za-z'-]*){0,5}?"  # "per pair of gloves", "/week"
OPERAND = rf"\(*{AMOUNT}{UNIT}\)*"
OPERATOR = r"\s?(?:[-+*/×÷−]|(?<![A-Za-z])x(?![A-Za-z]))\s?"
EQUATION = re.compile(rf"(?<![\w.,])(?P<left>{OPERAND}(?:{OPERATOR}{OPERAND})+){UNIT}\s?=\s?"
                      rf"(?P<right>{MONEY}{NUMBER})%?"
                      rf"(?![\d,.]*\d)(?!\s?[-+*/×÷x]\s?\(*[$£€]?\d)(?!{UNIT}\s?=)")
TOKEN = re.compile(rf"{NUMBER}%?|[-+*/×÷−()]|(?<![A-Za-z])x(?![A-Za-z])")
UNIT_FRACTION = re.compile(r"/\s?[A-Za-z]+")  # the slash of "days/week" is no division
PYTHON = {"×": "*", "x": "*", "÷": "/", "−": "-"}

SENTENCE_END = re.compile(r"(?<=[a-z0-9)%][.!?])\s+(?=[A-Z])")

REASONS = ("rewritten", "no_equation", "not_understood", "several_equations", "other_result")


@dataclass(frozen=True)
class Reading:
    """What became of one step: a reason of REASONS, and the rewrite where that is `rewritten`."""

    reason: str
    rewrite: Rewrite | None = None


class EquationCritic:
    """The Critic of TIRGen (thor/critic.py) for such steps; it needs no model and draws nothing."""

    async def solvable(self, step: str) -> bool:
        """Whether the step has one equation that Python confirms."""
        return read_step(step).rewrite is not None

    async def rewrite(self, step: str, fault: str | None) -> Rewrite:
        """The step with a question mark for the result, and the program that prints it."""
        rewrite = read_step(step).rewrite
        assert rewrite is not None, "only a step that code can solve is rewritten"
        return rewrite


def make_critic(seed: int) -> EquationCritic:
    """The Critic of one try, whatever the seed."""
    return EquationCritic()


def read_step(step: str) -> Reading:
    """The equation of a step as code, or why there is none."""
    if "=" not in step:
        return Reading("no_equation")
    equations = list(EQUATION.finditer(step))
    if step.count("=") > len(equations):
        return Reading("not_understood")
    if len(equations) > 1:
        return Reading("several_equations")
    expression = as_python(equations[0]["left"], equations[0]["right"])
    if expression is None:
        return Reading("other_result")
    return Reading("rewritten", Rewrite(without_result(step, equations[0]).strip(), f"print({expression})"))


def without_result(step: str, equation: re.Match) -> str:
    """The step with a question mark for the result, also where it is told before the equation."""
    start, end = equation.span("right")
    told = re.compile(rf"(?<![\d.,$£€¥₹]){MONEY}{re.escape(equation['right'].lstrip('$£€¥₹'))}(?![\d.,]*\d)")
    before = told.sub("?", step[:equation.start()])
    return before + step[equation.start():start] + "?" + step[end:]


def as_python(left: str, right: str) -> str | None:
    """The left side as a Python expression whose value is the right side; None if there is none.

    Units and currencies go. A percent sign is a unit or a division by 100, whichever gives the stated result.
    """
    tokens = [token.replace(",", "") for token in TOKEN.findall(UNIT_FRACTION.sub("", left))]
    stated = float(re.sub(r"[^\d.]", "", right))
    for percent in ("", " / 100"):
        expression = " ".join(PYTHON.get(token, token).replace("%", percent) for token in tokens)
        expression = expression.replace("( ", "(").replace(" )", ")")
        if value_of(expression) == stated:
            return expression
    return None


def value_of(expression: str) -> int | float | None:
    """What Python makes of numbers, + - * / and parentheses; None for anything else, and for a division by zero."""
    if not re.fullmatch(r"[\d.+\-*/() ]+", expression) or re.search(r"\*\s*\*|/\s*/|\d\s*\(", expression):
        return None
    try:
        return eval(expression, {"__builtins__": {}})
    except (SyntaxError, TypeError, ArithmeticError):
        return None


def steps_of(solution: str) -> list[str]:
    """A worked solution, one sentence a step; its last line, "#### 44", is left out."""
    lines = [line.strip() for line in solution.split("\n") if line.strip() and not line.startswith("####")]
    return [step for line in lines for step in SENTENCE_END.split(line)]


def actor_text(solution: str, answer: str) -> str:
    """A worked solution as an Actor would write it: steps with a blank line after each, and the boxed answer."""
    return "\n\n".join([*steps_of(solution), f"The answer is \\boxed{{{answer}}}."])


def count_readings(solutions: list[str]) -> dict[str, int]:
    """How many steps of some solutions come to which end, in the order of REASONS."""
    counts = Counter(read_step(step).reason for solution in solutions for step in steps_of(solution))
    return {reason: counts[reason] for reason in REASONS}
