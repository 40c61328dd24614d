"""TIRGen's loop (method, section 2): the Actor reasons, the Critic turns computations into code, the sandbox runs it.

`make_try` is one try of one problem, in both forms: short reasoning step by step, or long reasoning in windows.
Invariants: the Critic sees one step and never the problem; what follows a code block is what the sandbox printed; a try
ends as a trajectory or is dropped for a reason that has a name. Any number run at once, and none depends on another.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from thor.clients import ClientError, Completion, EngineClient, HTTPClient, Request
from thor.critic import FAULTS, Critic, Rewrite, Unusable, check_rewrite, request_seed
from thor.data import Problem
from thor.reward import boxed_answer
from thor.rollout import answer_part
from thor.sampling import Sampling
from thor.sandbox import LocalSandbox
from thor.template import CLOSING, Template
from thor.tirgen_text import Block, Step, cut_steps, cut_windows, on_new_line, written_trajectory
from thor.trajectory import Trajectory
from thor.tries import Try


@dataclass(frozen=True)
class LoopOptions:
    """The published numbers of the loop (method, section 7). Lengths are in tokens of the Actor's tokenizer."""

    sampling: Sampling = Sampling(0.6, 30)
    max_rounds: int = 5
    max_tokens: int = 20000  # L_max
    step_tokens: int = 4096  # L_step
    window_tokens: int = 4096  # L_window
    step_end: str = "\n\n"
    critic_retries: int = 2
    min_kept: float = 0.6
    max_added: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        lows = {"max_rounds": 1, "max_tokens": 1, "step_tokens": 1, "window_tokens": 2, "critic_retries": 0}
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {low} or more")
        for name in ("min_kept", "max_added"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if not self.step_end:
            raise ValueError("step_end is empty, so no step would end")


@dataclass(frozen=True)
class Tools:
    """What every try shares. `template` renders what is trained, `actor_template` what the Actor reads."""

    options: LoopOptions
    template: Template
    actor_template: Template
    actor: EngineClient | HTTPClient | None  # None where texts are given and no difficulty is measured
    make_critic: Callable[[int], Critic]
    sandbox: LocalSandbox
    texts: dict[str, list[str]] | None

    def is_thinking(self, problem: Problem) -> bool:
        """Whether the solution of a problem is a reasoning turn."""
        return self.template.is_thinking(self.template.prompt_text(problem.question))


async def make_try(tools: Tools, problem: Problem, number: int) -> Try:
    """The loop of method, section 2, for one try: a trajectory, or why there is none."""
    seed = request_seed(tools.options.seed, problem.id, number, "critic")
    draft = Draft(tools, problem, number, tools.make_critic(seed))
    written = tools.texts is not None or tools.is_thinking(problem)
    try:
        async for step in (written_steps(draft) if written else sampled_steps(draft)):
            await take_step(draft, step)
        return Try(problem.id, number, finished_trajectory(draft), critic=dict(draft.counts))
    except ClientError as error:
        reason, detail = "endpoint", str(error)
    except Dropped as dropped:
        reason, detail = dropped.reason, dropped.detail
    return Try(problem.id, number, None, reason, detail, draft.text + draft.pending, dict(draft.counts))


@dataclass
class Draft:
    """A try that is being made; τ of the method is `text`."""

    tools: Tools
    problem: Problem
    number: int
    critic: Critic
    text: str = ""
    blocks: list[Block] = field(default_factory=list)
    num_tokens: int = 0  # of τ
    num_generated: int = 0  # by the Actor
    ended: bool = False
    rewritten: bool = False  # the last step
    pending: str = ""  # a step that is not in τ yet
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, text: str) -> None:
        """Append to τ."""
        self.text, self.pending = self.text + text, ""
        self.num_tokens += len(self.tools.template.encode(text))

    async def ask_actor(self, max_tokens: int, stops: tuple[str, ...]) -> Completion:
        """The Actor's continuation of τ. Encoding τ anew is right here: the Critic has changed it, it is text."""
        options, prompt = self.tools.options, self.tools.actor_template.prompt_text(self.problem.question)
        seed = request_seed(options.seed, self.problem.id, self.number, "actor", self.num_tokens)
        completion = await self.tools.actor.complete(_request(options, prompt + self.text, max_tokens, stops, seed))
        self.num_generated += len(self.tools.template.encode(completion.text))
        return completion


class Dropped(Exception):
    """This try is given up, for a reason that is counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


async def sampled_steps(draft: Draft) -> AsyncIterator[Step]:
    """Short reasoning, step by step, each a continuation of what the Critic has made of those before."""
    options = draft.tools.options
    while draft.num_tokens < options.max_tokens:
        room = min(options.step_tokens, options.max_tokens - draft.num_tokens)
        completion = await draft.ask_actor(room, (options.step_end,))
        stopped = completion.finish in ("stop", "unknown")
        ended = completion.finish == "eos" or completion.finish == "unknown" and not completion.text
        if stopped and not ended and not completion.text.strip() and draft.text.endswith(options.step_end):
            raise Dropped("empty_steps")  # it would go on with blank lines up to L_max
        if completion.text or completion.finish == "stop":
            yield Step(completion.text + options.step_end * stopped)
        elif not ended:
            return  # there is no room in the Actor's context
        # where code took the place of the answer's end, the Actor writes that again
        if ended and not (completion.text and draft.rewritten):
            draft.ended = True
            return


async def written_steps(draft: Draft) -> AsyncIterator[Step]:
    """Reasoning that is there as a whole: a text that was given, or a reasoning Actor's, in windows."""
    tools, options = draft.tools, draft.tools.options
    if tools.texts is not None:
        texts = tools.texts[draft.problem.id]
        prompt = tools.template.prompt_text(draft.problem.question)
        text, ended = tools.template.continued(prompt, texts[draft.number % len(texts)]), True
    else:
        completion = await draft.ask_actor(options.max_tokens, ())
        text, ended = completion.text, completion.finish in ("eos", "unknown")
    for step in (cut_windows(tools.template, text, options.window_tokens) if tools.is_thinking(draft.problem)
                 else cut_steps(text, options.step_end)):
        yield step
    draft.ended = ended and draft.num_tokens <= options.max_tokens


async def take_step(draft: Draft, step: Step) -> None:
    """Append a step as the Actor wrote it, or its reasoning, code and output if the Critic finds code for it."""
    draft.rewritten, draft.pending = False, step.text
    if CLOSING in step.text:
        raise Dropped("actor_wrote_code")
    if step.ask and step.text.strip() and len(draft.blocks) < draft.tools.options.max_rounds:
        draft.counts["steps"] += 1
        draft.rewritten = await is_solvable(draft, step.text)
    if not draft.rewritten:
        draft.add(step.text)
        return
    logic, block = await code_for(draft, step.text)
    logic = step.text[:len(step.text) - len(step.text.lstrip())] + logic.lstrip()  # a step may begin within a line
    draft.add(on_new_line(draft.text + logic)[len(draft.text):] + block.text)
    draft.blocks.append(block)


async def is_solvable(draft: Draft, step: str) -> bool:
    """The Critic's first answer. Raises Dropped if it never gives one."""
    said = ""
    for _ in range(draft.tools.options.critic_retries + 1):
        try:
            verdict = await draft.critic.solvable(step)
        except Unusable as unusable:
            draft.counts[f"refused_{unusable.fault}"] += 1
            said = unusable.said
            continue
        draft.counts["solvable"] += verdict
        return verdict
    raise Dropped("no_verdict", said)


async def code_for(draft: Draft, step: str) -> tuple[str, Block]:
    """The Critic's second answer: r_logic, and code that ran. Raises Dropped if each one broke a rule or failed."""
    told = None
    for _ in range(draft.tools.options.critic_retries + 1):
        draft.counts["rewrites"] += 1
        try:
            rewrite = await draft.critic.rewrite(step, told)
            return rewrite.logic, await checked_block(draft, step, rewrite)
        except Unusable as unusable:
            draft.counts[f"refused_{unusable.fault}"] += 1
            last, error = unusable, f" {unusable.said}" if unusable.fault == "code_failed" else ""
            told = FAULTS[unusable.fault] + error
    raise Dropped(last.fault, last.said)


async def checked_block(draft: Draft, step: str, rewrite: Rewrite) -> Block:
    """A rewrite's code with its run, if the rewrite keeps all rules and the code passes. Raises Unusable, else."""
    options, earlier = draft.tools.options, [block.code for block in draft.blocks]
    fault = check_rewrite(step, rewrite, earlier, options.min_kept, options.max_added)
    if fault is not None:
        raise Unusable(fault, f"{rewrite.logic}\n{rewrite.code}")
    code = rewrite.code.strip("\n")
    execution = await draft.tools.sandbox.run(code)
    if execution.outcome == "infrastructure":
        raise Dropped("sandbox", execution.error)
    if not execution.passed:
        raise Unusable("code_failed", execution.error)
    return Block(code, execution)


def finished_trajectory(draft: Draft) -> Trajectory:
    """τ as tokens, not graded yet."""
    trajectory = written_trajectory(draft.tools.template, draft.problem, draft.number, draft.text, draft.blocks,
                                    draft.ended)
    if trajectory is None:
        raise Dropped("broken_fences")
    trajectory.tokens_generated, trajectory.seed = draft.num_generated, draft.tools.options.seed
    return trajectory


async def plain_answer(tools: Tools, problem: Problem, sample: int) -> str | None:
    """The boxed answer of a plain chain of thought of the Actor, without Critic and code. Raises ClientError."""
    options, prompt = tools.options, tools.actor_template.prompt_text(problem.question)
    seed = request_seed(options.seed, problem.id, sample, "difficulty")
    completion = await tools.actor.complete(_request(options, prompt, options.max_tokens, (), seed))
    return boxed_answer(answer_part(completion.text) if tools.template.is_thinking(prompt) else completion.text)


def _request(options: LoopOptions, prompt: str, max_tokens: int, stops: tuple[str, ...], seed: int) -> Request:
    sampling = options.sampling
    return Request(prompt, max_tokens, sampling.temperature, sampling.top_k, sampling.top_p, stops, seed)
