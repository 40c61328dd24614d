r"""TIRGen's Critic: it sees one step of reasoning, says whether code can do a part of it, and moves that into code.

Its two answers are parsed strictly and a rewrite is checked: the reasoning is the Actor's own, nothing is answered, the
code is new and computes something. Invariant: whatever it says breaks a rule that has a name (a key of FAULTS) or can
be used as it stands; the output that it predicts is thrown away. To change a prompt, edit it here or give a file
(docs/tirgen.md).
"""

import ast
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

from thor.clients import Completion, EngineClient, HTTPClient, Request
from thor.sampling import noise_key

STEP, FAULT, REWRITE = "{step}", "{fault}", "{rewrite}"  # what a prompt's file may hold, the first it must

SOLVABLE_PROMPT = """You read one step of somebody's solution of a mathematics problem. Can a part of it be worked out \
by a short Python program: arithmetic with numbers, an equation, an enumeration, a check? Planning is not enough. \
Answer with one word, YES or NO.

Step:
The box holds 12 rows of 7 eggs. 12 * 7 = 84, so there are 84 eggs.
Answer: YES

Step:
Let us first find how many eggs there are, and then how many are left.
Answer: NO

Step:
{step}
Answer:"""

REWRITE_PROMPT = """You read one step of somebody's solution of a mathematics problem. Move its computation into Python:
- First copy the step's reasoning in its own words and in its order, without the computation and without its result.
- Then write exactly one block that begins with ```python and ends with ```. It imports what it needs, computes from \
the numbers in the step and prints the result.
- Write nothing after the block. Do not solve the rest of the problem and do not write \\boxed.

Step:
The box holds 12 rows of 7 eggs. 12 * 7 = 84, so there are 84 eggs.
Rewritten:
The box holds 12 rows of 7 eggs.
```python
rows = 12
eggs_in_a_row = 7
print(rows * eggs_in_a_row)
```

Step:
{step}
Rewritten:
"""

# Follows the rewrite prompt when the last rewrite could not be used.
RETRY_PROMPT = """{rewrite}

That rewrite cannot be used: {fault}
Rewritten:
"""

# Every way in which a Critic can go wrong, and what it is told when it may try again.
FAULTS = {
    "too_long": "step and answer do not fit the context.",
    "no_verdict": "the answer is neither YES nor NO.",
    "no_block": "it has no complete block between ```python and ```.",
    "several_blocks": "it has more than one block.",
    "empty_code": "the block is empty.",
    "text_after_code": "something follows the block.",
    "reasoning_lost": "it leaves out too much of the step's own words.",
    "reasoning_added": "it says things that the step does not say.",
    "numbers_changed": "its reasoning has a number that the step does not have.",
    "answers_problem": "it answers the problem with \\boxed, which the step does not do.",
    "code_not_new": "the code has been written before.",
    "nothing_computed": "the code prints what is known already and computes nothing.",
    "code_failed": "the code failed",
}

BLOCK = re.compile(r"^```py(?:thon)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
PREDICTED = re.compile(r"\s*^```(?:output|text)?[ \t]*\n.*?(?:^```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")  # neither LaTeX commands nor the x of 3 x 4
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
INERT = (ast.Module, ast.Expr, ast.Constant, ast.Load, ast.Store, ast.Name, ast.Assign, ast.JoinedStr,
         ast.FormattedValue)  # print(84) and the like


@dataclass(frozen=True)
class Rewrite:
    """What the Critic makes of a step: r_logic, which may be empty, and a program without fences."""

    logic: str
    code: str


class Unusable(Exception):
    """An answer of the Critic that breaks a rule: a key of FAULTS, and what it said."""

    def __init__(self, fault: str, said: str):
        super().__init__(fault)
        self.fault, self.said = fault, said


class Critic(Protocol):
    """The Critic of one try, made by `make_critic(seed)`; what it says depends on that seed and the steps alone."""

    async def solvable(self, step: str) -> bool:
        """Whether code can do a part of the step. Raises Unusable, ClientError."""

    async def rewrite(self, step: str, fault: str | None) -> Rewrite:
        """The step's reasoning and its code; `fault` says why the last rewrite of it was not used. Raises the same."""


@dataclass(frozen=True)
class CriticOptions:
    """How a language model is asked to be the Critic."""

    solvable_prompt: str = SOLVABLE_PROMPT
    rewrite_prompt: str = REWRITE_PROMPT
    verdict_tokens: int = 16
    rewrite_tokens: int = 2048
    temperature: float = 0.6
    top_k: int = 30
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("solvable_prompt", "rewrite_prompt"):
            if STEP not in getattr(self, name):
                raise ValueError(f"the {name} has no {STEP}, so the Critic would never see the step")
        for name in ("verdict_tokens", "rewrite_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")


class LMCritic:
    """A language model as the Critic. `render` makes a prompt of a question: a chat turn, or just its text."""

    def __init__(self, client: EngineClient | HTTPClient, seed: int, options: CriticOptions,
                 render: Callable[[str], str]):
        self.client, self.seed, self.options, self.render = client, seed, options, render
        self._asked = 0
        self._last = ""

    async def solvable(self, step: str) -> bool:
        """Whether it answers YES; anything but YES or NO is a fault."""
        question = self.options.solvable_prompt.replace(STEP, step.strip())
        return parse_verdict(await self._ask(question, self.options.verdict_tokens, ()))

    async def rewrite(self, step: str, fault: str | None) -> Rewrite:
        """Its rewrite, the words of which are not checked here."""
        question = self.options.rewrite_prompt.replace(STEP, step.strip())
        if fault is not None:
            question += RETRY_PROMPT.replace(FAULT, fault).replace(REWRITE, self._last)
        # a predicted output would be thrown away, so it is not even written
        self._last = await self._ask(question, self.options.rewrite_tokens, ("```output",))
        return parse_rewrite(self._last)

    async def _ask(self, question: str, max_tokens: int, stops: tuple[str, ...]) -> str:
        self._asked += 1
        options = self.options
        request = Request(self.render(question), max_tokens, options.temperature, options.top_k, options.top_p, stops,
                          request_seed(self.seed, self._asked))
        completion = await self.client.complete(request)
        if completion.finish == "length" and not completion.text:
            raise Unusable("too_long", "the prompt leaves no room for an answer")
        return answer_of(completion)


def request_seed(*parts: int | str) -> int:
    """A stable 63-bit seed from run seed, problem id, try, … in the caller's order."""
    return int.from_bytes(noise_key(*parts)[:8], "little") >> 1


def parse_verdict(text: str) -> bool:
    """YES or NO as the first word, nothing else. Raises Unusable."""
    match = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    if not match:
        raise Unusable("no_verdict", text)
    return match[1].lower() == "yes"


def parse_rewrite(text: str) -> Rewrite:
    """Reasoning, one complete block, then nothing but a predicted output, which is thrown away. Raises Unusable."""
    blocks = list(BLOCK.finditer(text))
    if not blocks:
        raise Unusable("no_block", text)
    logic, code = text[:blocks[0].start()].strip(), blocks[0][1].strip("\n")
    if len(blocks) > 1 or "```" in logic:
        raise Unusable("several_blocks", text)
    if not code.strip():
        raise Unusable("empty_code", text)
    if PREDICTED.sub("", text[blocks[0].end():], count=1).strip():
        raise Unusable("text_after_code", text)
    return Rewrite(logic, code)


def check_rewrite(step: str, rewrite: Rewrite, earlier: Collection[str], min_kept: float,
                  max_added: float) -> str | None:
    """Which rule a rewrite breaks (a key of FAULTS), None if it can be run. `earlier` are the codes before it.

    `min_kept`: share of the step's words that it keeps, in their order; the computation may go, so less than 1.
    `max_added`: share of its words that are not the step's, or not in the step's order.
    """
    if "\\boxed" in rewrite.logic + rewrite.code and "\\boxed" not in step:
        return "answers_problem"
    kept, added = kept_and_added(step, rewrite.logic)
    if kept < min_kept:
        return "reasoning_lost"
    if added > max_added:
        return "reasoning_added"
    if not set(NUMBER.findall(rewrite.logic)) <= set(NUMBER.findall(step)):
        return "numbers_changed"
    if rewrite.code in earlier or rewrite.code.strip() in step:
        return "code_not_new"
    if "```" in rewrite.code + rewrite.logic:
        return "several_blocks"
    return None if computes(rewrite.code) else "nothing_computed"


def kept_and_added(step: str, logic: str) -> tuple[float, float]:
    """(share of the step's words that `logic` keeps in order, share of the words of `logic` that are not among these).

    Words are of two letters or more; numbers, signs and LaTeX commands belong to the computation. Of no words, all
    are kept and none is added.
    """
    theirs, ours = WORD.findall(step.lower()), WORD.findall(logic.lower())
    common = sum(block.size for block in SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks())
    return (common / len(theirs) if theirs else 1.0), (1 - common / len(ours) if ours else 0.0)


def computes(code: str) -> bool:
    """Whether a program does more than print constants. What cannot be parsed is left for the sandbox to fail."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return not all(isinstance(node, INERT) or _is_print(node) for node in nodes)


def _is_print(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def answer_of(completion: Completion) -> str:
    """What a model answers, without the thoughts of one that thinks first."""
    return completion.text.rpartition("</think>")[2]
