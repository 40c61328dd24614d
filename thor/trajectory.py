"""What a trajectory is: token ids, spans over them, what the sandbox said, and how all that is written down.

Everything else in the package reads this record and nothing else reads the text to find out what was thought, run or
observed. Invariant: spans tile `response_ids`, so every token is think, act or observe, and the loss mask is derived
from them and never from text (paper Eq. 1: o^t is context, never a target).
"""

import json
from dataclasses import asdict, dataclass, field, fields

THINK, ACT, OBSERVE = "think", "act", "observe"

# What can become of one code block. Only the policy's own doing is ever judged: `infrastructure` never is.
OUTCOMES = ("ok", "silent", "error", "timeout", "memory", "output-limit", "infrastructure")

FINISHES = ("eos", "length", "rounds", "failed", "infrastructure")

# Of the fields of a file that are computed with, whoever wrote it.
FIELD_TYPES = {"id": str, "sample": int, "question": str, "answer": str | None, "text": str, "boxed": str | None,
               "corrections": int, "tokens_generated": int}


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of `response_ids`, all of one kind: think, act or observe."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Execution:
    """One run of one code block: its outcome, what it printed, its last error line, and wall-clock seconds."""

    outcome: str
    stdout: str
    error: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Exit code 0 and something printed (method, section 1)."""
        return self.outcome == "ok"


@dataclass(frozen=True)
class Attempt:
    """A try that self-correction dropped: the regenerated suffix and its code, from token `start` of the response."""

    step: int
    start: int
    response_ids: list[int]
    logprobs: list[float]
    execution: Execution


@dataclass
class Trajectory:
    """One solution of one problem. Field names and meaning are the file format (README, "Files")."""

    id: str
    sample: int
    question: str
    answer: str | None
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    executions: list[Execution | None] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    text: str = ""
    boxed: str | None = None
    correct: bool | None = None
    finish: str = "length"
    corrections: int = 0
    retry_temperature: float | None = None  # of the tokens after a backtrack, if there was one
    tokens_generated: int = 0
    thinking: bool = False
    seed: int = 0
    model: str = ""


@dataclass(frozen=True)
class Step:
    """One (r^t, a^t, o^t): think tokens [start, act_start), act [act_start, act_end), observation up to `end`."""

    start: int
    act_start: int
    act_end: int
    end: int
    execution: Execution | None


def add_span(spans: list[Span], kind: str, start: int, end: int) -> list[Span]:
    """`spans` with [start, end) appended; nothing for no tokens, and two think spans in a row become one."""
    if start == end:
        return spans
    if spans and spans[-1].kind == kind == THINK:
        return spans[:-1] + [Span(THINK, spans[-1].start, end)]
    return spans + [Span(kind, start, end)]


def check_spans(spans: list[Span], length: int) -> None:
    """Raise ValueError unless `spans` tile [0, length) in order with known kinds."""
    end = 0
    for span in spans:
        if span.kind not in (THINK, ACT, OBSERVE):
            raise ValueError(f"unknown span kind {span.kind!r}; a span is think, act or observe")
        if span.start != end or span.end <= span.start:
            raise ValueError(f"spans must tile the response: {span} does not start at token {end} or is empty")
        end = span.end
    if end != length:
        raise ValueError(f"spans cover {end} tokens of a response of {length}")


def loss_mask(spans: list[Span], length: int) -> list[bool]:
    """m of Eq. 5, one bool per response token: True on think and act (end of turn included), False on observe."""
    check_spans(spans, length)
    return [span.kind != OBSERVE for span in spans for _ in range(span.start, span.end)]


def code_steps(trajectory: Trajectory) -> list[Step]:
    """The steps that hold a code block, in order. r^t starts after the last token of the previous observation."""
    steps, start, acts = [], 0, 0
    spans = trajectory.spans
    for index, span in enumerate(spans):
        if span.kind == OBSERVE:
            start = span.end
        if span.kind != ACT:
            continue
        observed = index + 1 < len(spans) and spans[index + 1].kind == OBSERVE
        end = spans[index + 1].end if observed else span.end
        steps.append(Step(start, span.start, span.end, end, trajectory.executions[acts]))
        start, acts = end, acts + 1
    return steps


def num_observations(trajectory: Trajectory) -> int:
    """Outputs that the sandbox gave; a </think> that was written for the model is none."""
    return sum(step.end > step.act_end for step in code_steps(trajectory))


def kept_executions(trajectory: Trajectory) -> list[Execution]:
    """What really ran and stayed in the response; blocks past the round budget never ran."""
    return [execution for execution in trajectory.executions if execution is not None]


def to_json(trajectory: Trajectory) -> str:
    """One line of JSON, without the newline."""
    return json.dumps(asdict(trajectory), ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Trajectory:
    """The inverse of `to_json`. Raises ValueError that names what is missing or wrong; unknown fields are ignored."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("a trajectory is a JSON object")
    required = ("id", "sample", "question", "answer", "response_ids", "spans", "executions")
    missing = [name for name in required if name not in record]
    if missing:
        raise ValueError(f"not a trajectory: no field {', '.join(missing)}")
    try:
        return _build(record)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a trajectory: {error!r}") from None


def _check(trajectory: Trajectory) -> None:
    for name, kind in FIELD_TYPES.items():
        if not isinstance(getattr(trajectory, name), kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{name} is {getattr(trajectory, name)!r}; it must be {wanted}")
    if min(trajectory.prompt_ids + trajectory.response_ids, default=0) < 0:
        raise ValueError("a token id is negative")
    length, runs = len(trajectory.response_ids), trajectory.executions
    check_spans(trajectory.spans, length)
    acts = sum(span.kind == ACT for span in trajectory.spans)
    if len(runs) != acts:
        raise ValueError(f"{len(runs)} executions for {acts} act spans; there must be one each, null where none ran")
    if trajectory.logprobs and len(trajectory.logprobs) != length:
        raise ValueError(f"{len(trajectory.logprobs)} logprobs for {length} tokens; there must be one each, or none")
    unknown = {run.outcome for run in runs if run} - set(OUTCOMES)
    if unknown:
        raise ValueError(f"unknown outcome {', '.join(sorted(unknown))}; it must be one of {', '.join(OUTCOMES)}")
    if trajectory.finish not in FINISHES:
        raise ValueError(f"unknown finish {trajectory.finish!r}; it must be one of {', '.join(FINISHES)}")


def _build(record: dict) -> Trajectory:
    known = {name.name for name in fields(Trajectory)}
    values = {name: value for name, value in record.items() if name in known}
    values.setdefault("prompt_ids", [])
    values["spans"] = [Span(**span) for span in values["spans"]]
    values["executions"] = [run and Execution(**run) for run in values["executions"]]
    attempts = [dict(attempt) for attempt in values.get("attempts", [])]
    values["attempts"] = [Attempt(**attempt | {"execution": Execution(**attempt["execution"])}) for attempt in attempts]
    trajectory = Trajectory(**values)
    _check(trajectory)
    return trajectory
