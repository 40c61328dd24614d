r"""Text of TIRGen's Actor: cut into the steps that the Critic sees, and put together again as a trajectory of tokens.

An Actor's text is text: the Critic has changed it, so there is no sampled sequence of tokens to keep. When it is
finished it is encoded once, piece by piece, at the boundaries of SFT. Invariant: what becomes an observe span is what
the sandbox printed, and each act span has its execution; a text where that is not so is none to be trained on.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from thor.data import Problem
from thor.reward import boxed_answer
from thor.rollout import answer_part
from thor.template import CLOSING, THINK_OPENS, Template, cut_response, encode_response, observation_text
from thor.tirgen_filters import prose_and_codes
from thor.trajectory import ACT, OBSERVE, THINK, Execution, Span, Trajectory


@dataclass(frozen=True)
class Step:
    """A piece of the Actor's text, in short reasoning up to a blank line. `ask`: whether the Critic may see it."""

    text: str
    ask: bool = True


def cut_steps(text: str, step_end: str) -> list[Step]:
    r"""A written solution as steps that end with `step_end`.

    The Critic is not asked about one with a box: taken out of a text that nobody continues, the answer would be gone.
    """
    parts = [part + step_end for part in text.split(step_end)]
    parts[-1] = parts[-1].removesuffix(step_end)
    return [Step(part, "\\boxed" not in part) for part in parts if part]


def cut_windows(template: Template, text: str, window_tokens: int) -> list[Step]:
    """A reasoning model's response as windows of its <think> text, each cut at the newline nearest to `window_tokens`.

    A remainder shorter than half a window is left untouched, and so is what follows </think> (method, section 2).
    """
    opening = THINK_OPENS.match(text)
    start = opening.end() if opening else 0
    end = text.find("</think>") if "</think>" in text else len(text)
    lines = re.findall(r"[^\n]*\n|[^\n]+", text[start:end])
    ends = list(accumulate(len(template.encode(line)) for line in lines))
    steps, first, done = [Step(text[:start], ask=False)], 0, 0
    while first < len(lines) and 2 * (ends[-1] - done) >= window_tokens:
        last = min(range(first, len(lines)), key=lambda index: abs(ends[index] - done - window_tokens))
        steps.append(Step("".join(lines[first:last + 1])))
        first, done = last + 1, ends[last]
    steps.append(Step("".join(lines[first:]) + text[end:], ask=False))
    return [step for step in steps if step.text]


@dataclass(frozen=True)
class Block:
    """A program that passed, and its run."""

    code: str
    execution: Execution

    @property
    def text(self) -> str:
        """The fenced program and the output block that follows it."""
        act = f"```python\n{self.code}\n{CLOSING}"
        return act + observation_text(act, self.execution)


def on_new_line(text: str) -> str:
    """`text` with a newline at its end, if it has none: a fence must begin its line."""
    return text if not text or text.endswith("\n") else text + "\n"


def written_trajectory(template: Template, problem: Problem, number: int, text: str, blocks: list[Block],
                       ended: bool) -> Trajectory | None:
    """A finished text with its blocks as trajectory `number` of a problem; None if the text's fences are not theirs.

    A text that has `ended` gets the EOS as its last token, inside the last think span.
    """
    if ended:
        text = text.rstrip()
        if blocks and text.endswith(blocks[-1].text.rstrip()):
            text += "\n"  # an output ends with its line, as at inference
    given = [piece.strip() for kind, piece in cut_response(text) if kind == OBSERVE]
    if given != [block.text.partition(f"\n{CLOSING}\n")[2].strip() for block in blocks]:
        return None
    ids, spans = encode_response(template, text)
    if sum(span.kind == ACT for span in spans) != len(blocks):
        return None
    if not ended:
        ids, spans = ids[:-1], list(_without_last_token(spans))
    prompt = template.prompt_text(problem.question)
    thinking = template.is_thinking(prompt)
    prose, _ = prose_and_codes(text)
    return Trajectory(
        problem.id, number, problem.question, problem.answer, template.encode_prompt(prompt), ids, spans=spans,
        executions=[block.execution for block in blocks], text=text, thinking=thinking,
        boxed=boxed_answer(answer_part(prose) if thinking else prose), finish="eos" if ended else "length")


def _without_last_token(spans: list[Span]) -> Iterator[Span]:
    """Spans without the EOS that encoding put at the end, which nobody wrote."""
    assert spans[-1].kind == THINK, "EOS is thought"
    yield from spans[:-1]
    if spans[-1].end - spans[-1].start > 1:
        yield Span(THINK, spans[-1].start, spans[-1].end - 1)
