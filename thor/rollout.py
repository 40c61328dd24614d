"""The think–act–observe loop, and its one rewind: a trajectory is straight-line code, batching is the engine's business.

A rollout is a coroutine over one sequence (paper Eq. 1): sample reasoning and code, run the code, append what it
printed, go on. Self-correction is a truncation to a fixed anchor and another try with fresh noise. Invariants: what is
recorded is what was sampled, token by token; dropped attempts cost no code round and no response length; budgets belong
to one trajectory.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from thor.data import Problem
from thor.engine import Engine, Sequence
from thor.reward import boxed_answer
from thor.sampling import Sampling, noise_key
from thor.sandbox import LocalSandbox
from thor.template import FenceScanner, Template, code_of
from thor.trajectory import ACT, OBSERVE, THINK, Attempt, Execution, Trajectory, add_span, code_steps

# Greedy decoding would repeat what just failed, so a retry is sampled at this temperature (method, section 5).
GREEDY_RETRY_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Tools:
    """What a rollout works with."""

    engine: Engine
    sandbox: LocalSandbox
    template: Template


@dataclass(frozen=True)
class RolloutOptions:
    """Budgets of one trajectory, in tokens unless the name says otherwise; 0 thinking tokens is no thinking budget.

    `stop_at_failure` ends a rollout at its first failed execution, which is what training wants (method, section 4.1).
    """

    sampling: Sampling = Sampling()
    max_response_tokens: int = 3200
    max_code_rounds: int = 10
    max_corrections: int = 4
    suffix_tokens: int = 100
    max_thinking_tokens: int = 0
    stop_at_failure: bool = False
    seed: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        for name in ("max_code_rounds", "max_corrections", "suffix_tokens", "max_thinking_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.max_response_tokens < 1:
            raise ValueError(f"max_response_tokens is {self.max_response_tokens}; it must be 1 or more")

    @property
    def retry_sampling(self) -> Sampling:
        """How a retry is sampled: as the rest, unless that is greedy."""
        greedy = self.sampling.temperature == 0
        return replace(self.sampling, temperature=GREEDY_RETRY_TEMPERATURE) if greedy else self.sampling


@dataclass
class _Draft:
    """A trajectory in the making: its sequence, its record, and where its budgets end (positions in the sequence)."""

    tools: Tools
    options: RolloutOptions
    sequence: Sequence
    record: Trajectory
    limit: int
    thinking_limit: int | None

    @property
    def prompt_tokens(self) -> int:
        return len(self.record.prompt_ids)

    @property
    def num_steps(self) -> int:
        return len(self.record.executions)

    @property
    def num_retries(self) -> int:
        """Attempts at this step that were dropped so far."""
        return sum(attempt.step == self.num_steps for attempt in self.record.attempts)

    @property
    def prose(self) -> str:
        """The policy's own prose up to here, and a </think> written for it; a program or an output may hold one, too."""
        template, spans = self.tools.template, self.record.spans
        ids = self.sequence.ids[self.prompt_tokens:]
        parts = [(span.kind, ids[span.start:span.end]) for span in spans] + [(THINK, ids[spans[-1].end if spans else 0:])]
        return "".join(template.decode(part) for kind, part in parts
                       if kind == THINK or self.record.thinking and part == template.close_thinking_ids)

    @property
    def thinking_closed(self) -> bool:
        """Whether </think> was written, by the model or for it."""
        return "</think>" in self.prose

    def key(self, attempt: int) -> bytes:
        """The noise of this trajectory from here on, for the given attempt at the step it is in."""
        return rollout_key(self.options, self.record.id, self.record.sample, self.num_steps, attempt)

    def add_span(self, kind: str, start: int, end: int) -> None:
        """Record a span given by positions in the sequence."""
        self.record.spans = add_span(self.record.spans, kind, start - self.prompt_tokens, end - self.prompt_tokens)


@dataclass(frozen=True)
class _Tried:
    """One attempt at a step: why it ended, and, if its code block closed, where the act starts and what the run gave."""

    stopped: str
    act_start: int | None = None
    execution: Execution | None = None

    @property
    def failed(self) -> bool:
        """The policy's own code failed; an infrastructure failure is nobody's."""
        return self.stopped == "stop" and not self.execution.passed


def rollout_key(options: RolloutOptions, problem_id: str, sample: int, step: int, attempt: int) -> bytes:
    """The noise key of one attempt: no two attempts, steps, samples, problems or rounds share noise."""
    return noise_key(options.seed, options.round, problem_id, sample, step, attempt)


@dataclass(frozen=True)
class FailedStep:
    """A step whose code failed, with its sequence still in memory: where the step level branches (method, section 4.2).

    `start` is where the step's reasoning r^t begins and `anchor` where r_pre ends, positions in the sequence; `sequence`
    is None where another process holds it.
    """

    trajectory: Trajectory
    sequence: Sequence | None
    start: int
    anchor: int


async def solve_group(tools: Tools, problem: Problem, samples: list[int], options: RolloutOptions,
                      gate: asyncio.Semaphore, done: Callable[[Trajectory], Awaitable[None]],
                      failures: list[FailedStep] | None = None) -> None:
    """Several independent samples of one problem, whose prompt is read once. `gate` bounds how many run at a time.

    `done` gets each trajectory as it ends, in whatever order they do. With `failures`, the sequence of a trajectory that
    ended at a failed execution is kept and appended there, and the caller frees it.
    """
    engine = tools.engine
    keys = [rollout_key(options, problem.id, sample, 0, 0) for sample in samples]
    first = engine.new(tools.template.prompt_ids(problem.question), keys[0])
    sequences = [first] + [engine.fork(first, key) for key in keys[1:]]
    prompt_read = asyncio.Event()

    async def solve_one(sample: int, sequence: Sequence) -> None:
        async with gate:
            if sequence is first:
                await engine.prefill(first)
                prompt_read.set()
            await prompt_read.wait()
            trajectory = await solve(tools, problem, sample, sequence, options)
            if failures is not None and trajectory.finish == "failed":
                failures.append(failed_step(trajectory, sequence, options))
                kept.add(sample)
            elif sequence is not first:
                engine.free(sequence)
            await done(trajectory)

    kept: set[int] = set()
    await asyncio.gather(*map(solve_one, samples, sequences))
    if samples[0] not in kept:
        engine.free(first)  # not before: its siblings copy the prompt from it


def failed_step(trajectory: Trajectory, sequence: Sequence | None, options: RolloutOptions) -> FailedStep:
    """The last step of a trajectory that ended with a failure, split into r_pre and r_suf (method, section 4.2)."""
    step, prompt = code_steps(trajectory)[-1], len(trajectory.prompt_ids)
    anchor = max(step.start, step.act_start - options.suffix_tokens)
    return FailedStep(trajectory, sequence, prompt + step.start, prompt + anchor)


async def branch_group(tools: Tools, failed: FailedStep, num_branches: int, max_branch_tokens: int,
                       options: RolloutOptions, gate: asyncio.Semaphore) -> list[Trajectory]:
    """G' samples of one failed step from its anchor, each ONE think–act step (r_suf, a); frees the step's sequence.

    A branch's prompt is h^t + r_pre. It ends at its first closing fence ("rounds": its one block has run), at EOS, or
    after `max_branch_tokens`; nothing is appended.
    """
    engine, step = tools.engine, len(failed.trajectory.executions) - 1
    keys = [noise_key(options.seed, options.round, failed.trajectory.id, failed.trajectory.sample, step, "branch", number)
            for number in range(num_branches)]
    engine.truncate(failed.sequence, failed.anchor, keys[0])
    sequences = [engine.fork(failed.sequence, key) for key in keys]

    async def branch(number: int, sequence: Sequence) -> Trajectory:
        async with gate:
            grown = await _branch(tools, failed, number, sequence, max_branch_tokens, options)
            engine.free(sequence)
            return grown

    branches = await asyncio.gather(*map(branch, range(num_branches), sequences))
    engine.free(failed.sequence)
    return branches


async def _branch(tools: Tools, failed: FailedStep, number: int, sequence: Sequence, max_branch_tokens: int,
                  options: RolloutOptions) -> Trajectory:
    source = failed.trajectory
    record = Trajectory(source.id, number, source.question, source.answer, prompt_ids=list(sequence.ids),
                        thinking=source.thinking, seed=options.seed)
    limit = min(failed.anchor + max_branch_tokens, tools.engine.max_tokens)
    draft = _Draft(tools, replace(options, max_code_rounds=1), sequence, record, limit, None)
    tried = await _attempt_step(draft, failed.start, options.sampling)
    end = len(sequence.ids)
    act_start = end if tried.act_start is None else tried.act_start
    draft.add_span(THINK, failed.anchor, act_start)
    draft.add_span(ACT, act_start, end)
    record.executions = [] if tried.execution is None else [tried.execution]
    return _finished(draft, "rounds" if tried.stopped == "stop" else tried.stopped)


async def continue_branch(tools: Tools, failed: FailedStep, branch: Trajectory, options: RolloutOptions) -> Trajectory:
    """Where a branch of `failed` leads whose code ran: one continuation, whose prompt is all that stands before it.

    It has what is left of the trajectory's budgets of tokens and code rounds; "length" at once if that is nothing.
    """
    step, source = code_steps(branch)[-1], failed.trajectory
    observation = tools.template.observation_ids(branch.response_ids[step.act_start:], step.execution)
    ids = branch.prompt_ids + branch.response_ids + observation
    tokens_left = min(options.max_response_tokens + len(source.prompt_ids), tools.engine.max_tokens) - len(ids)
    if tokens_left < 1:
        return Trajectory(branch.id, branch.sample, branch.question, branch.answer, prompt_ids=ids, finish="length")
    budget = replace(options, max_response_tokens=tokens_left,
                     max_code_rounds=max(0, options.max_code_rounds - len(source.executions)))
    key = noise_key(options.seed, options.round, branch.id, source.sample, branch.sample, "continued")
    sequence = tools.engine.new(ids, key)
    try:
        return await solve(tools, Problem(branch.id, branch.question, branch.answer), branch.sample, sequence, budget)
    finally:
        tools.engine.free(sequence)


async def solve(tools: Tools, problem: Problem, sample: int, sequence: Sequence, options: RolloutOptions) -> Trajectory:
    """Eq. 1: one trajectory on `sequence`, which holds the prompt. The caller frees the sequence."""
    draft = _draft(tools, problem, sample, sequence, options)
    while True:
        start = len(sequence.ids)
        tried = await _corrected_step(draft, start)
        finish = _record_step(draft, start, tried)
        if finish is not None:
            return _finished(draft, finish)


def _draft(tools: Tools, problem: Problem, sample: int, sequence: Sequence, options: RolloutOptions) -> _Draft:
    template = tools.template
    prompt = template.prompt_text(problem.question)
    written = template.decode(sequence.ids[len(template.encode_prompt(prompt)):])  # nothing, but where a branch goes on
    thinking = template.is_thinking(prompt) and "</think>" not in written
    record = Trajectory(problem.id, sample, problem.question, problem.answer, prompt_ids=list(sequence.ids),
                        thinking=thinking, seed=options.seed)
    limit = min(len(sequence.ids) + options.max_response_tokens, tools.engine.max_tokens)
    budget = options.max_thinking_tokens if thinking else 0
    return _Draft(tools, options, sequence, record, limit, len(sequence.ids) + budget if budget else None)


async def _corrected_step(draft: _Draft, start: int) -> _Tried:
    """One think–act step; while its code fails, again from the same anchor with fresh noise (method, section 5).

    The anchor lies `suffix_tokens` before the code, never before `start`, where this step's reasoning begins. After
    `max_corrections` retries the last attempt stands.
    """
    tried = await _attempt_step(draft, start, draft.options.sampling)
    if tried.failed:
        anchor = max(start, tried.act_start - draft.options.suffix_tokens)
    while tried.failed and draft.num_retries < draft.options.max_corrections:
        _drop_attempt(draft, anchor, tried.execution)
        draft.tools.engine.truncate(draft.sequence, anchor, draft.key(draft.num_retries))
        tried = await _attempt_step(draft, start, draft.options.retry_sampling)
    return tried


def _drop_attempt(draft: _Draft, anchor: int, execution: Execution) -> None:
    """Keep what is about to be cut off as a record of its own."""
    record, sequence = draft.record, draft.sequence
    record.attempts.append(Attempt(draft.num_steps, anchor - draft.prompt_tokens, sequence.ids[anchor:],
                                   sequence.logprobs[anchor:], execution))
    record.corrections += 1
    record.retry_temperature = draft.options.retry_sampling.temperature


async def _attempt_step(draft: _Draft, start: int, sampling: Sampling) -> _Tried:
    """Sample until a code block closes, and run it. What already stands after `start` is kept reasoning (r_pre)."""
    template, sequence = draft.tools.template, draft.sequence
    scanner = FenceScanner(template)
    for token in sequence.ids[start:]:
        scanner.push(token)
    stopped = await _sample(draft, sampling, scanner.push)
    if stopped != "stop":
        return _Tried(stopped)
    act_start = start + scanner.act_start
    if draft.num_steps == draft.options.max_code_rounds:
        return _Tried("rounds", act_start)
    execution = await draft.tools.sandbox.run(code_of(template.decode(sequence.ids[act_start:])))
    stopped = "infrastructure" if execution.outcome == "infrastructure" else "stop"
    return _Tried(stopped, act_start, execution)


async def _sample(draft: _Draft, sampling: Sampling, stop: Callable[[int], bool]) -> str:
    """Sample to a stop, an EOS or the end of a budget. The thinking budget ends nothing once </think> was written."""
    sequence, engine = draft.sequence, draft.tools.engine
    while True:
        bounded = draft.thinking_limit is not None and not draft.thinking_closed
        limit = min(draft.limit, draft.thinking_limit) if bounded else draft.limit
        before = len(sequence.ids)
        stopped = await engine.sample(sequence, sampling, limit - before, stop)
        draft.record.tokens_generated += len(sequence.ids) - before
        if stopped != "length" or limit == draft.limit or not draft.thinking_closed:
            return stopped


def _record_step(draft: _Draft, start: int, tried: _Tried) -> str | None:
    """Write a step's spans and its execution down and append what follows it; the finish if that was the last one."""
    sequence, record = draft.sequence, draft.record
    end = len(sequence.ids)
    if tried.act_start is None:
        draft.add_span(THINK, start, end)
        budget = draft.thinking_limit
        if tried.stopped == "length" and budget is not None and end >= budget and not draft.thinking_closed:
            return _append(draft, draft.tools.template.close_thinking_ids)
        return tried.stopped
    draft.add_span(THINK, start, tried.act_start)
    draft.add_span(ACT, tried.act_start, end)
    record.executions.append(tried.execution)
    if tried.stopped != "stop":
        return tried.stopped
    if tried.failed and draft.options.stop_at_failure:
        return "failed"
    return _append(draft, draft.tools.template.observation_ids(sequence.ids[tried.act_start:], tried.execution))


def _append(draft: _Draft, ids: list[int]) -> str | None:
    """Append tokens that nobody sampled, as an observe span; "length" if there is no room for them."""
    start = len(draft.sequence.ids)
    if start + len(ids) > draft.limit:
        return "length"
    draft.tools.engine.append(draft.sequence, ids)
    draft.add_span(OBSERVE, start, start + len(ids))
    return None


def _finished(draft: _Draft, finish: str) -> Trajectory:
    """The finished record: tokens, log-probs, text and the boxed answer, which is read in the policy's own prose only."""
    record, template, sequence = draft.record, draft.tools.template, draft.sequence
    record.finish = finish
    record.response_ids = sequence.ids[draft.prompt_tokens:]
    record.logprobs = sequence.logprobs[draft.prompt_tokens:]
    shown = record.response_ids[:-1] if finish == "eos" else record.response_ids
    record.text = template.decode(shown)
    record.boxed = boxed_answer(answer_part(draft.prose) if record.thinking else draft.prose)
    return record


def answer_part(text: str) -> str:
    """What a reasoning model's answer is read from: the text after the last </think>, nothing where there is none."""
    return text.rpartition("</think>")[2] if "</think>" in text else ""
