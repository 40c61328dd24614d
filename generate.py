"""Solve problems with a model that thinks, runs Python and reads the result.

    python generate.py --model DIR --question "What is 17 * 23?"
    python generate.py --model DIR --problems FILE --out FILE --samples 4
    python generate.py --replay FILE

The first prints one solution with thought, code, output and dropped attempts told apart, without --model by the small
model that comes with the repository; the second appends one trajectory a line and skips what is there already, so a
killed run continues where it was; the third samples such a file again, with the settings beside it, and says where it
first differs.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from thor import config
from thor.checkpoint import differences, read_settings, write_aside
from thor.config import option
from thor.data import Problem, append_trajectory, open_to_append, read_problems, read_trajectories
from thor.engine import Engine, warn_if_inexact
from thor.paged_engine import make_engine
from thor.replay import RecordedSandbox, first_difference, tokens_in_order
from thor.reward import grade
from thor.rollout import RolloutOptions, Tools, solve_group
from thor.sampling import Sampling
from thor.sandbox import open_sandbox
from thor.template import INSTRUCTION, TEXT_INSTRUCTION, Template, load_template, stop_ids
from thor.trajectory import ACT, OBSERVE, Trajectory
from thor.weights import DTYPES, load_model

DEMO_MODEL = Path(__file__).parent / "demo-model"

MAX_AUTO_SLOTS = 64

# Past this many trajectories, and this share of them, lost to the sandbox's own failures, a run stops.
MAX_LOST, MAX_LOST_SHARE = 8, 0.05

# What may differ between the two halves of an interrupted run without changing a trajectory.
NOT_SETTINGS = ("question", "problems", "out", "replay", "recorded_tools", "samples", "sandbox", "sandbox_require", "sandbox_log",
                "sandbox_log_mode", "slots", "kv_gb", "threads")

COLOURS = {ACT: "\033[36m", OBSERVE: "\033[33m", "dropped": "\033[31m", "end": "\033[0m"}


@dataclass
class GenerateOptions:
    """One flag a field; `config.run` makes the command line of it."""

    model: str | None = option(None, "Hugging Face directory of a Llama-, Qwen2- or Qwen3-type model; --question alone: demo-model")
    question: str | None = option(None, "one question; its solution is printed")
    problems: str | None = option(None, "JSON lines with id, question and answer")
    out: str | None = option(None, "file that trajectories are appended to")
    replay: str | None = option(None, "file of trajectories that are sampled again and compared")
    recorded_tools: bool = option(False, "with --replay: take the recorded outputs, run no code")
    style: str = option("chat", "chat: the tokenizer's template; base: plain text")
    system: str | None = option(None, "replaces the chat template's own system text")
    instruction: str | None = option(None, "replaces our instruction on how to solve and how to write code")
    thinking: bool = option(False, "ask a reasoning model for a <think> turn")
    samples: int = option(1, "samples a problem")
    seed: int = option(0, "run seed; with the problem's id and the sample's number it decides all noise")
    temperature: float = option(0.6, "0 is greedy")
    top_p: float = option(1.0, "1 is off")
    top_k: int = option(0, "0 is off")
    max_response_tokens: int = option(3200, "tokens of a response, observations included")
    max_code_rounds: int = option(10, "code blocks that are run; 0 with --instruction none solves by text alone")
    max_corrections: int = option(4, "retries of one failed step (self-correction); 0 is off")
    suffix_tokens: int = option(100, "tokens of reasoning that a retry samples again, L_suf")
    max_thinking_tokens: int = option(0, "thinking budget, after which </think> is written for the model; 0 is off")
    sandbox: str = option("local", "local, or URLs of a sandbox service, separated by commas")
    sandbox_require: str = option("best", "isolation of code run here: best (there is), strict (all or none) or basic")
    sandbox_log: str | None = option(None, "file that executions are appended to, or answered from (docs/sandbox.md)")
    sandbox_log_mode: str = option("record", "record, replay (run nothing) or cache (run what is deterministic once)")
    cpu_seconds: float = option(10.0, "CPU time of one code block, past which it has failed")
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", "float32 or bfloat16")
    exact: str = option("on", "on: on a CPU a trajectory does not depend on its batch mates; off: a little faster")
    slots: int = option(0, "sequences in memory at once; 0 takes what fits into --kv_gb")
    kv_gb: float = option(4.0, "memory for keys and values, in GB, when --slots is 0")
    threads: int = option(0, "CPU threads of torch; 0 leaves its default")

    @property
    def rollout(self) -> RolloutOptions:
        """The part that rollouts read. Raises ValueError for a budget or a temperature that makes no sense."""
        return RolloutOptions(Sampling(self.temperature, self.top_k, self.top_p), self.max_response_tokens,
                              self.max_code_rounds, self.max_corrections, self.suffix_tokens,
                              self.max_thinking_tokens, seed=self.seed)


def main(options: GenerateOptions) -> None:
    """Print the solutions of one question, write those of many problems, or sample recorded ones again."""
    if options.replay is not None:
        if options.question is not None or options.problems is not None:
            raise ValueError("--replay takes its problems from the file; leave --question and --problems out")
        return replay(options)
    if options.recorded_tools:
        raise ValueError("--recorded_tools takes outputs from a file of trajectories; name it with --replay FILE")
    if (options.question is None) == (options.problems is None):
        raise ValueError("give either --question or --problems")
    if options.model is None:
        raise ValueError("--model is missing: the Hugging Face directory of the model")
    if options.problems is not None:
        if options.out is None:
            raise ValueError("--problems needs --out, the file that trajectories are written to")
        generate(options, read_problems(options.problems), Path(options.out))
        return
    if not options.question.strip():
        raise ValueError("the question is empty")
    show_solutions(options)


def demo_defaults(options: GenerateOptions) -> config.Defaults:
    """The small model that comes with the repository and its settings, for a question without --model; else nothing."""
    if options.model is not None or options.question is None:
        return {}
    print(f"no --model: the demo's model, which knows the demo's kinds of questions only ({DEMO_MODEL / 'README.md'})",
          file=sys.stderr)
    return json.loads((DEMO_MODEL / "settings.json").read_text(encoding="utf-8")) | {"model": str(DEMO_MODEL)}


def show_solutions(options: GenerateOptions) -> None:
    """Print each sample of --question as it ends."""
    template = make_template(options)

    async def show(trajectory: Trajectory) -> None:
        colour = sys.stdout.isatty() or "FORCE_COLOR" in os.environ
        print(render(trajectory, template, colour), flush=True)

    problem = Problem("question", options.question, None)
    asyncio.run(run(options, template, [(problem, list(range(options.samples)))], show))


def generate(options: GenerateOptions, problems: list[Problem], out: Path) -> int:
    """Append the trajectories of `problems` that `out` does not hold yet, graded where there is a gold answer.

    Returns how many the sandbox lost, which are not in `out`.
    """
    template = make_template(options)
    finished = begin_or_continue(options, problems, out)
    jobs = [(problem, [sample for sample in range(options.samples) if (problem.id, sample) not in finished])
            for problem in problems]
    jobs = [(problem, samples) for problem, samples in jobs if samples]
    if not jobs:
        print(f"{out} holds all {len(problems) * options.samples} trajectories: nothing left to do")
        return 0
    total = sum(len(samples) for _, samples in jobs)
    with open_to_append(out) as file, tqdm(total=total, unit="trajectory", smoothing=0.1) as bar:
        sink = Sink(options, file, bar)
        asyncio.run(run(options, template, jobs, sink.take))
    if sink.lost == total:
        raise ValueError(f"the sandbox failed in all {total} trajectories, which is not the model's doing")
    if sink.lost:
        print(f"{sink.lost} trajectories were lost to failures of the sandbox; the same command makes them again")
    return sink.lost


@dataclass
class Sink:
    """Where finished trajectories go: graded, written, counted on the progress bar."""

    options: GenerateOptions
    file: TextIO
    bar: tqdm
    correct: list[bool] = field(default_factory=list)
    tokens: int = 0
    taken: int = 0
    lost: int = 0

    async def take(self, trajectory: Trajectory) -> None:
        """Grade and write one; one that the sandbox lost is only counted, and too many of them end the run."""
        self.taken += 1
        if trajectory.finish == "infrastructure":
            self.lost += 1
            if self.lost > max(MAX_LOST, MAX_LOST_SHARE * self.taken):
                raise ValueError(f"the sandbox failed in {self.lost} of {self.taken} trajectories, which is not the "
                                 f"model's doing; all others are in {self.options.out}, the same command continues")
            return
        trajectory.model = self.options.model
        if trajectory.answer is not None:
            trajectory.correct = await grade(trajectory)
            self.correct.append(trajectory.correct)
        append_trajectory(self.file, trajectory)
        self.tokens += trajectory.tokens_generated
        self.show()

    def show(self) -> None:
        """One more on the progress bar, with tokens per second and accuracy so far."""
        elapsed = self.bar.format_dict["elapsed"]
        rate = {"tokens/s": f"{self.tokens / elapsed:.0f}"} if elapsed else {}
        right = {"accuracy": f"{sum(self.correct) / len(self.correct):.3f}"} if self.correct else {}
        self.bar.set_postfix(rate | right, refresh=False)
        self.bar.update()


async def run(options: GenerateOptions, template: Template, jobs: list[tuple[Problem, list[int]]],
              done: Callable[[Trajectory], Awaitable[None]], recorded: list[RecordedSandbox] | None = None) -> None:
    """Solve `jobs`, (problem, sample numbers) each; `done` gets every trajectory as it ends.

    With `recorded`, one for each job, no code runs.
    """
    closed_sandbox = contextlib.nullcontext() if recorded else open_sandbox(
        options.sandbox, options.cpu_seconds, options.sandbox_require, options.sandbox_log, options.sandbox_log_mode)
    engine, in_flight = build_engine(options, template, jobs)
    async with closed_sandbox as sandbox:
        gate = asyncio.Semaphore(in_flight)
        await asyncio.gather(*(solve_group(Tools(engine, own, template), problem, samples, options.rollout, gate, done)
                               for (problem, samples), own in zip(jobs, recorded or [sandbox] * len(jobs), strict=True)))


def replay(options: GenerateOptions) -> None:
    """Sample every trajectory of --replay again and print where it first differs; SystemExit(1) if any does."""
    path = Path(options.replay)
    recorded = read_trajectories(path)
    if not recorded:
        raise ValueError(f"{path} holds no trajectory")
    known = {name: value for name, value in read_settings(path.with_name(path.name + ".settings.json")).items()
             if name in (field.name for field in dataclasses.fields(GenerateOptions))}
    known["model"] = options.model or known.get("model")  # a model may have moved
    if known["model"] is None:
        raise ValueError(f"the settings beside {path} name no model; give --model")
    again = asyncio.run(run_again(replace(options, **known), recorded))
    different = 0
    for trajectory, copy in zip(recorded, again, strict=True):
        found = first_difference(trajectory, copy)
        different += found is not None
        print(f"{trajectory.id} sample {trajectory.sample}: " + (
            f"the same {len(tokens_in_order(trajectory))} tokens" if found is None else
            f"differs after {found.position} tokens, in the {found.part}: was {found.recorded}, is {found.again}"))
    print(f"{len(recorded) - different} of {len(recorded)} trajectories are the same to the last token")
    if different:
        raise SystemExit(1)


async def run_again(options: GenerateOptions, recorded: list[Trajectory]) -> list[Trajectory]:
    """Each trajectory sampled once more, in order; with --recorded_tools its code gets what it got before."""
    template, found = make_template(options), {}
    jobs = [(Problem(trajectory.id, trajectory.question, trajectory.answer), [trajectory.sample]) for trajectory in recorded]
    with tqdm(total=len(recorded), unit="trajectory") as bar:
        async def done(trajectory: Trajectory) -> None:
            found[trajectory.id, trajectory.sample] = trajectory
            bar.update()

        await run(options, template, jobs, done, list(map(RecordedSandbox, recorded)) if options.recorded_tools else None)
    return [found[trajectory.id, trajectory.sample] for trajectory in recorded]


def make_template(options: GenerateOptions) -> Template:
    """Check what can be checked before a model is loaded, and load the tokenizer."""
    assert options.model is not None, "a caller checks that there is a model"
    for name, low in (("samples", 1), ("slots", 0), ("threads", 0)):
        if getattr(options, name) < low:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be {low} or more")
    for name, allowed in (("dtype", tuple(DTYPES)), ("exact", ("on", "off"))):
        if getattr(options, name) not in allowed:
            raise ValueError(f"{name} is {getattr(options, name)!r}; it must be one of {', '.join(allowed)}")
    config.check_device(options.device)
    if options.rollout.max_code_rounds == 0 and options.instruction is None:
        options.instruction = TEXT_INSTRUCTION
    instruction = INSTRUCTION if options.instruction is None else options.instruction
    template = load_template(options.model, options.style, instruction, options.system, options.thinking)
    if options.max_thinking_tokens and not template.is_thinking(template.prompt_text("1 + 1?")):
        raise ValueError(f"max_thinking_tokens is {options.max_thinking_tokens}, but no reasoning turn is asked for; "
                         "use --thinking, or leave the budget out")
    return template


def build_engine(options: GenerateOptions, template: Template, jobs: list[tuple[Problem, list[int]]]) -> tuple[Engine, int]:
    """The engine for `jobs`, and how many trajectories it should work on at a time."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.model, DTYPES[options.dtype], options.device)
    longest = 0
    for problem, _ in jobs:
        prompt = len(template.prompt_ids(problem.question))
        if prompt >= model.config.max_context:
            raise ValueError(f"problem {problem.id!r}: its prompt of {prompt} tokens does not fit the model's context of "
                             f"{model.config.max_context}")
        longest = max(longest, prompt)
    context = min(longest + options.max_response_tokens, model.config.max_context)
    shape = model.config
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPES[options.dtype].itemsize
    fitting = options.slots or max(1, min(MAX_AUTO_SLOTS, int(options.kv_gb * 1e9 / (token_bytes * context))))
    in_flight = min(fitting, sum(len(samples) for _, samples in jobs))
    idle = -(-in_flight // options.samples) if options.samples > 1 else 0  # first samples that wait for their siblings
    stops = stop_ids(template.tokenizer, options.model)
    engine = make_engine(model, stops, in_flight + idle, context, exact=options.exact == "on")
    warn_if_inexact(engine)
    return engine, in_flight


def begin_or_continue(options: GenerateOptions, problems: list[Problem], out: Path) -> set[tuple[str, int]]:
    """The (problem id, sample) pairs that `out` holds. Refuses to mix two settings or other problems into one file."""
    settings = {name: value for name, value in dataclasses.asdict(options).items()
                if name in (known.name for known in dataclasses.fields(GenerateOptions)) and name not in NOT_SETTINGS}
    beside = out.with_name(out.name + ".settings.json")
    before = read_settings(beside) if out.is_file() and out.stat().st_size else {}
    open_to_append(out).close()  # after that: of a file that is not ours nothing is cut off
    if out.stat().st_size:
        if differing := differences(before, settings, settings):
            raise ValueError(f"{out} was begun with other settings ({differing}); use another file")
    else:
        write_aside(beside, json.dumps(settings, indent=2) + "\n")
    asked, finished = {problem.id: problem for problem in problems}, read_trajectories(out)
    for trajectory in finished:
        problem = asked.get(trajectory.id)
        if problem is None or (problem.question, problem.answer) != (trajectory.question, trajectory.answer):
            raise ValueError(f"{out} holds a solution of another problem {trajectory.id!r} than is asked for; use another file")
    return {(trajectory.id, trajectory.sample) for trajectory in finished}


def render(trajectory: Trajectory, template: Template, colour: bool) -> str:
    """The solution as text for a terminal: code, output and dropped attempts in colours of their own."""
    paint = {name: code if colour else "" for name, code in COLOURS.items()}
    parts = [f"\n--- sample {trajectory.sample} ---\n"]
    for span in trajectory.spans:
        cuts = [attempt for attempt in trajectory.attempts if span.start <= attempt.start < span.end]
        position = span.start
        for attempt in cuts:
            parts.append(template.decode(trajectory.response_ids[position:attempt.start]))
            position = attempt.start
            parts.append(f"{paint['dropped']}[dropped: {template.decode(attempt.response_ids)} → "
                         f"{attempt.execution.error}]{paint['end']}")
        end = span.end - (trajectory.finish == "eos" and span is trajectory.spans[-1])  # nobody wants to read the EOS
        text = template.decode(trajectory.response_ids[position:end])
        parts.append(f"{paint.get(span.kind, '')}{text}{paint['end']}" if span.kind in paint else text)
    answer = "none" if trajectory.boxed is None else trajectory.boxed
    parts.append(f"\n--- answer: {answer} · finish: {trajectory.finish} · {len(trajectory.executions)} code blocks · "
                 f"{trajectory.corrections} corrections · {trajectory.tokens_generated} tokens ---")
    return "".join(parts)


if __name__ == "__main__":
    config.run(main, GenerateOptions, __doc__, defaults=demo_defaults)
