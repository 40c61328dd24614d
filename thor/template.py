"""The text format of a solution, as tokens: prompt, code fence, observation, and the same cuts in written text.

Here is decided where a step's code begins and ends. Fences are found in the decoded text of the current line, never in
token ids, and nothing that was sampled is ever cut or encoded again: the act span begins with the token that brings the
first character of the opening fence and ends with the token that brings the third backtick of the closing one. An
observation is encoded once, by itself, and appended.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from thor.trajectory import ACT, OBSERVE, THINK, Execution, Span, add_span

OPENING, CLOSING, OUTPUT = "```py", "```", "```output"
QUESTION = "{question}"  # an instruction may say where the question goes, for instance after worked examples
SHOWN_HEAD = SHOWN_TAIL = 128  # characters of a long output that are kept at each end

INSTRUCTION = """Reason step by step. Whenever a computation can be done by code, write a Python block that prints the result:
```python
print(2 ** 10)
```
Its output follows in an output block, and you go on from there. Every block runs by itself: import what it needs, and \
do not use variables of an earlier block. Put the final answer in \\boxed{}."""

TEXT_INSTRUCTION = "Reason step by step, without writing code. Put the final answer in \\boxed{}."

THINK_OPENS = re.compile(r"\s*<think>\n?")

# What is said for the model when its thinking budget is spent (method, section 5). Not sampled, so never trained.
CLOSE_THINKING = "\n\nI have thought long enough and answer now.\n</think>\n\n"


@dataclass
class Template:
    """Prompts and observations of one tokenizer. `style` is base (plain text) or chat (the tokenizer's own template).

    `system` replaces the chat template's own system text; `thinking` asks it for a reasoning turn.
    """

    tokenizer: PreTrainedTokenizerBase
    style: str = "chat"
    instruction: str = INSTRUCTION
    system: str | None = None
    thinking: bool = False
    _texts: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.style not in ("base", "chat"):
            raise ValueError(f"style is {self.style!r}; it must be base or chat")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so a response could not end")
        if self.style == "chat" and not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use --style base")
        if self.style == "chat" and self.thinking and "think" not in self.tokenizer.chat_template:
            raise ValueError("the chat template knows no thinking; leave --thinking off for this model")

    def prompt_text(self, question: str) -> str:
        """(q, I) of Eq. 1 as text: what the model reads before its first own token."""
        if self.style == "base" and QUESTION in self.instruction:
            return self.request(question).rstrip("\n") + "\n"
        if self.style == "base":
            head = f"{self.instruction}\n\n" if self.instruction else ""
            return f"{head}Problem: {question}\nSolution:\n" + ("<think>\n" if self.thinking else "")
        return self.render([{"role": "user", "content": self.request(question)}])

    def request(self, question: str) -> str:
        """What is asked: the question and then the instruction, or the instruction with the question in its place."""
        if QUESTION in self.instruction:
            return self.instruction.replace(QUESTION, question)
        return f"{question}\n\n{self.instruction}" if self.instruction else question

    def render(self, messages: list[dict[str, str]]) -> str:
        """Chat messages as the text that asks for the next assistant turn."""
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}] + [m for m in messages if m["role"] != "system"]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking)

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt."""
        return self.encode_prompt(self.prompt_text(question))

    def encode_prompt(self, text: str) -> list[int]:
        """A prompt's ids: a chat template writes its own special tokens, a plain text gets those of the tokenizer."""
        return self.tokenizer.encode(text, add_special_tokens=self.style == "base")

    def is_thinking(self, prompt_text: str) -> bool:
        """Whether the response is a reasoning one: asked for, or the prompt itself ends with an open <think>."""
        return self.thinking or opens_thinking(prompt_text)

    def continued(self, prompt_text: str, written: str) -> str:
        """A written reasoning turn as it goes on after its prompt: <think> is opened once, by the one or the other."""
        opening = THINK_OPENS.match(written)
        if opens_thinking(prompt_text):
            return written[opening.end():] if opening else written
        missing = self.thinking and not opening and "</think>" in written
        return "<think>\n" + written if missing else written

    def encode(self, text: str) -> list[int]:
        """The ids of one piece of a response, nothing added. Sampling and SFT encode with this function alone."""
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, special ones included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_text(self, token: int) -> str:
        """The text of one token by itself; a part of a character is U+FFFD, but a newline is always seen."""
        if token not in self._texts:
            self._texts[token] = self.decode([token])
        return self._texts[token]

    def observation_ids(self, act_ids: list[int], execution: Execution) -> list[int]:
        """The observation that follows a code block, encoded once."""
        return self.encode(observation_text(self.decode(act_ids), execution))

    @cached_property
    def close_thinking_ids(self) -> list[int]:
        """The tokens that end a reasoning turn whose budget is spent."""
        return self.encode(CLOSE_THINKING)


def opens_thinking(prompt_text: str) -> bool:
    """Whether a prompt ends with an open <think>; one anywhere else in it is a part of what is asked."""
    return prompt_text.rstrip().endswith("<think>")


def load_template(directory: str | Path, style: str, instruction: str, system: str | None, thinking: bool) -> Template:
    """The template of a Hugging Face directory's tokenizer. Raises ValueError where there is none or it has no EOS."""
    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is not a directory; a model is a Hugging Face directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{directory} holds no tokenizer that can be loaded ({error})") from None
    return Template(tokenizer, style, instruction, system, thinking)


def stop_ids(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> set[int]:
    """Where sampling stops: the trained EOS of the tokenizer, and those that generation_config.json names."""
    ids = {tokenizer.eos_token_id}
    if (Path(directory) / "generation_config.json").is_file():
        extra = GenerationConfig.from_pretrained(directory).eos_token_id
        ids |= set(extra if isinstance(extra, list) else [] if extra is None else [extra])
    return ids


def shown(execution: Execution) -> str:
    """o^t: what the model is shown of a run. A long output keeps both ends (method, section 1)."""
    text = execution.stdout.rstrip() if execution.passed else execution.error
    if len(text) <= SHOWN_HEAD + SHOWN_TAIL:
        return text
    return text[:SHOWN_HEAD] + "..." + text[-SHOWN_TAIL:]


def observation_text(act_text: str, execution: Execution) -> str:
    """The output block that follows `act_text`."""
    return ("" if act_text.endswith("\n") else "\n") + f"{OUTPUT}\n{shown(execution)}\n{CLOSING}\n"


def code_of(act_text: str) -> str:
    """The program in an act span: the lines between its fences."""
    opening = act_text.index(OPENING)
    body = act_text[act_text.index("\n", opening) + 1:act_text.rindex(CLOSING)]
    return body.rstrip(" \t")  # the indent of the closing fence


class FenceScanner:
    """Reads a step token by token, as it is sampled, and says when its code block is closed.

    A fence opens on a line that starts with ```py (```python too) and closes on a line with only whitespace before three
    backticks, if nothing but whitespace follows them inside the token that brings the third. A fence glued to code does
    not close, and a fence never closed opens nothing.
    """

    def __init__(self, template: Template):
        self.template = template
        self.num_tokens = 0
        self.act_start: int | None = None  # tokens before the one that brings the opening fence
        self._line: list[int] | None = []  # tokens of the current line, or None once it can hold no fence
        self._before = ""  # the text of those tokens that belongs to the current line

    def push(self, token: int) -> bool:
        """Take one token; True if it closes the block."""
        self.num_tokens += 1
        if self._line is None and "\n" not in self.template.token_text(token):
            return False
        text = self._line_with(token)
        closed = self._read(text)
        last = text.rpartition("\n")[2]
        self._keep(token, last, new_line="\n" in text)
        return closed

    def _line_with(self, token: int) -> str:
        """The current line's text with this token's, which may hold newlines. A line that was given up on counts as 'x'."""
        if self._line is None:
            return "x" + self.template.token_text(token)
        known = self.template.decode(self._line)
        return self._before + self.template.decode(self._line + [token])[len(known):]

    def _read(self, text: str) -> bool:
        """Look for fences in the lines of `text`, whose last one is not finished."""
        lines = text.split("\n")
        for index, line in enumerate(lines):
            if self.act_start is None and line.startswith(OPENING):
                self.act_start = self._opening_token(index)
            elif self.act_start is not None and line.lstrip(" \t").startswith(CLOSING):
                rest = "\n".join(lines[index:]).lstrip(" \t").removeprefix(CLOSING)
                if not rest.strip():
                    return True
        return False

    def _opening_token(self, newlines_before: int) -> int:
        """How many tokens of the step precede the one with the first character of the line that just opened a fence."""
        if newlines_before or self._line is None:  # the line began inside this very token
            return self.num_tokens - 1
        for count in range(1, len(self._line) + 1):
            if self.template.decode(self._line[:count]).rpartition("\n")[2]:
                return self.num_tokens - 1 - len(self._line) + count - 1
        return self.num_tokens - 1

    def _keep(self, token: int, line: str, new_line: bool) -> None:
        """Remember the current line while a fence may still come in it."""
        if not self._may_hold_fence(line):
            self._line, self._before = None, ""
        else:
            self._line = [token] if new_line or self._line is None else self._line + [token]
            self._before = line

    def _may_hold_fence(self, line: str) -> bool:
        if self.act_start is None:
            return OPENING.startswith(line)
        return CLOSING.startswith(line.lstrip(" \t"))


def cut_response(text: str) -> list[tuple[str, str]]:
    """Written text cut where sampling would cut it: ("policy", think and perhaps act) and ("observe", …) pieces.

    A policy piece ends right after the three backticks that close its code, or at the end of the text. An output block
    is an observation only where it follows such a piece; anywhere else the author wrote it, and it stays policy.
    """
    pieces, start = [], 0
    while start < len(text):
        closing = _closing_fence(text, start)
        end = len(text) if closing is None else closing
        pieces.append(("policy", text[start:end]))
        observation = re.compile(r"\s*\n```output\n.*?(?<=\n)[ \t]*```[ \t]*(?:\n|\Z)", re.DOTALL).match(text, end)
        start = end
        if closing is not None and observation:
            pieces.append((OBSERVE, observation.group()))
            start = observation.end()
    return pieces


def _closing_fence(text: str, start: int) -> int | None:
    """Where the first code block after `start` is closed, as the offset after its backticks; None if none is."""
    opening = re.compile(r"^```py[^\n]*\n", re.MULTILINE).search(text, start)
    if not opening:
        return None
    closing = re.compile(r"^[ \t]*```(?=[ \t]*$)", re.MULTILINE).search(text, opening.end())
    return closing.end() if closing else None


def encode_response(template: Template, text: str) -> tuple[list[int], list[Span]]:
    """A written response as (response_ids, spans), the trained EOS last: what SFT trains on."""
    ids: list[int] = []
    spans: list[Span] = []
    for kind, piece in cut_response(text):
        piece_ids = template.encode(piece)
        start = len(ids)
        ids += piece_ids
        spans = add_span(spans, OBSERVE, start, len(ids)) if kind == OBSERVE else add_policy(
            spans, template, start, ids)
    ids.append(template.tokenizer.eos_token_id)
    return ids, add_span(spans, THINK, len(ids) - 1, len(ids))


def add_policy(spans: list[Span], template: Template, start: int, ids: list[int]) -> list[Span]:
    """`spans` with the policy tokens from `start` to the end of `ids` split into think and, if code closed, act."""
    scanner = FenceScanner(template)
    closed = [scanner.push(token) for token in ids[start:]]
    if True not in closed[-1:] or True in closed[:-1]:
        return add_span(spans, THINK, start, len(ids))
    act_start = start + scanner.act_start
    return add_span(add_span(spans, THINK, start, act_start), ACT, act_start, len(ids))


def imitated_outputs(text: str, num_observations: int) -> int:
    """How many output blocks the model wrote itself: those in the text less those that the sandbox gave."""
    return max(0, len(re.findall(r"^```output\s*$", text, re.MULTILINE)) - num_observations)
