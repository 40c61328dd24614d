"""Build the cold-start data: an Actor reasons, a Critic moves its computations into code, the sandbox runs it (TIRGen).

    python tirgen.py --actor DIR|URL[,URL] --critic DIR|URL[,URL]|scripted --problems FILE --out DIR

Each finished try of a problem is a line of OUT/tries.jsonl; a killed run continues where it was. Then the filters write
OUT/sft.jsonl, which train_sft.py reads, OUT/rejected.jsonl with a reason each, and the funnel: what each stage left.
The loop is thor/actor_critic.py, the Critic's prompts thor/critic.py, the filters thor/tirgen_filters.py.
"""

import asyncio
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from thor import config, funnel, tries
from thor.actor_critic import LoopOptions, Tools, make_try, plain_answer
from thor.clients import ClientError, ClientOptions, EngineClient, HTTPClient, open_client
from thor.config import option, required
from thor.critic import REWRITE_PROMPT, SOLVABLE_PROMPT, Critic, CriticOptions, LMCritic
from thor.data import Problem, open_to_append, read_problems, read_records
from thor.reward import grade
from thor.sampling import Sampling
from thor.sandbox import open_sandbox
from thor.template import INSTRUCTION, TEXT_INSTRUCTION, load_template
from thor.tirgen_filters import FilterSettings, Rejected, filter_tirgen, first_objection
from thor.trajectory import Trajectory, to_json
from thor.tries import Try

MAX_LOST_IN_A_ROW = 32  # tries lost to servers or to the sandbox, after which going on would only lose more

# What may differ between two runs of one directory without changing a try.
NOT_SETTINGS = (
    "problems", "out", "critic_tokenizer", "tries", "difficulty_samples", "concurrency", "shard",
    "merge", "filter_only", "max_trivial_share", "min_calls", "one_call_share", "source_field", "sandbox",
    "sandbox_require", "sandbox_log", "sandbox_log_mode", "slots", "threads", "timeout", "max_retries", "backoff",
    "key_variable")


@dataclass
class TirgenOptions:
    """One flag a field; `config.run` makes the command line of it."""

    actor: str = required("the model that will be trained: Hugging Face directory, or URLs that serve /v1/completions")
    critic: str = required("the same for the Critic, or scripted:NAME for make_critic of thor/NAME.py (scripted: toy)")
    problems: str = required("JSON lines with id, question and answer")
    out: str = required("directory of the tries, the data and the funnel")
    actor_tokenizer: str | None = option(None, "directory of the Actor's tokenizer, where --actor is a URL")
    critic_tokenizer: str | None = option(None, "directory of the chat template of a Critic at a URL; else plain text")
    actor_texts: str | None = option(None, "JSON lines with id and text: written reasoning; the Actor writes none")
    style: str = option("chat", "of the Actor. chat: the tokenizer's template; base: plain text")
    critic_style: str = option("chat", "of the Critic")
    system: str | None = option(None, "replaces the chat template's own system text, for the Actor")
    instruction: str | None = option(None, "what the trained model will be asked; replaces our instruction")
    actor_instruction: str | None = option(None, "what the Actor is asked; replaces ours, to solve by text alone")
    thinking: bool = option(False, "a reasoning Actor: it writes all of its <think>, the Critic sees windows of it")
    tries: int = option(8, "tries of each problem")
    max_rounds: int = option(5, "code blocks of a trajectory, after which the Critic is no longer asked")
    max_tokens: int = option(20000, "of a trajectory, L_max")
    step_tokens: int = option(4096, "of a step of short reasoning at most, L_step")
    window_tokens: int = option(4096, "of a window of long reasoning, L_window")
    step_end: str = option("\n\n", "ends a step of short reasoning")
    temperature: float = option(0.6, "of Actor and Critic; 0 is greedy")
    top_k: int = option(30, "0 is off")
    top_p: float = option(1.0, "1 is off")
    critic_retries: int = option(2, "further answers of the Critic about a step when one broke a rule or failed")
    verdict_tokens: int = option(16, "of the Critic's YES or NO; more for one that thinks first")
    rewrite_tokens: int = option(2048, "of the Critic's rewrite")
    solvable_prompt: str | None = option(None, "file with another prompt for the verdict; it must have {step}")
    rewrite_prompt: str | None = option(None, "file with another prompt for the rewrite; it must have {step}")
    min_kept: float = option(0.6, "share of a step's words that its rewrite must keep, in their order; 0 is off")
    max_added: float = option(0.2, "share of a rewrite's words that need not be the step's; 1 is off")
    difficulty_samples: int = option(4, "solutions by text of each solved problem; if all are right, it goes; 0 is off")
    max_trivial_share: float = option(0.4, "of a trajectory's blocks without import and control flow; 1 is off")
    min_calls: int = option(1, "code blocks of a trajectory that is kept")
    one_call_share: float = option(0.5, "of the trajectories with one code block that are kept; 1 is off")
    source_field: str = option("source", "field of a problem by which the funnel is split")
    concurrency: int = option(64, "tries in flight")
    shard: str = option("1/1", "i/n: only every n-th problem, from the i-th on; i counts from 1")
    merge: str | None = option(None, "directories of shards, separated by commas: put together in --out and filtered")
    filter_only: bool = option(False, "filter the tries that --out holds and make no others")
    seed: int = option(0, "run seed; with the problem's id and the number of the try it decides all noise")
    sandbox: str = option("local", "local, or URLs of a sandbox service, separated by commas")
    sandbox_require: str = option("best", "isolation of code run here: best (there is), strict (all or none) or basic")
    sandbox_log: str | None = option(None, "file that executions are appended to, or answered from (docs/sandbox.md)")
    sandbox_log_mode: str = option("record", "record, replay (run nothing) or cache (run what is deterministic once)")
    cpu_seconds: float = option(10.0, "CPU time of one code block, past which it has failed")
    device: str = option("cpu", "cpu or cuda, for directories")
    dtype: str = option("float32", "float32 or bfloat16, for directories")
    slots: int = option(16, "sequences in memory at once, for directories")
    context: int = option(4096, "tokens of prompt and text together, for directories; at most the model's own")
    threads: int = option(0, "CPU threads of torch; 0 leaves its default")
    timeout: float = option(300.0, "seconds without a byte from a server")
    max_retries: int = option(5, "further requests to a server that fails")
    backoff: float = option(1.0, "seconds before the first of them, twice as long before each further one")
    key_variable: str = option("THOR_API_KEY", "environment variable that holds the servers' API key")

    @property
    def loop(self) -> LoopOptions:
        """The part that the loop reads. Raises ValueError for a length or a share that makes no sense."""
        return LoopOptions(Sampling(self.temperature, self.top_k, self.top_p), self.max_rounds, self.max_tokens,
                           self.step_tokens, self.window_tokens, self.step_end, self.critic_retries, self.min_kept,
                           self.max_added, self.seed)

    @property
    def as_critic(self) -> CriticOptions:
        """How a language model is asked to be the Critic. Raises ValueError for a prompt without the step."""
        prompts = [default if path is None else Path(path).read_text(encoding="utf-8") for path, default in (
            (self.solvable_prompt, SOLVABLE_PROMPT), (self.rewrite_prompt, REWRITE_PROMPT))]
        return CriticOptions(*prompts, self.verdict_tokens, self.rewrite_tokens, self.temperature, self.top_k,
                             self.top_p)

    @property
    def filters(self) -> FilterSettings:
        """The thresholds of the filters. Raises ValueError for one that makes no sense."""
        return FilterSettings(self.max_trivial_share, self.min_calls, self.one_call_share, self.seed)


def main(options: TirgenOptions) -> None:
    """Make the tries that are missing, or put those of shards together; then filter all of them."""
    check(options)
    problems, out = read_problems(options.problems), Path(options.out)
    wanted = of_shard(problems, options.shard)
    if all(problem.answer is None for problem in wanted):
        raise ValueError(f"{options.problems}, shard {options.shard}: no problem has an answer to grade by")
    if options.merge:
        tries.merge([Path(name) for name in options.merge.split(",")], out, settings_of(options), problems)
    elif options.filter_only:
        tries.cut_half_lines(out)
    else:
        finished = tries.begin_or_continue(out, settings_of(options), problems)
        asyncio.run(build(options, wanted, finished))
    made = tries.read_tries(out)
    tries.check_problems(out, made.values(), problems)
    write_results(options, wanted, made, out)


async def build(options: TirgenOptions, problems: list[Problem], finished: dict[tries.Key, Try]) -> None:
    """Make the tries of `problems` that are not `finished`, and measure how difficult those with a right one are."""
    out = Path(options.out)
    measured = {name for name, (_, drawn) in tries.read_difficulty(out).items() if drawn >= options.difficulty_samples}
    missing = [(problem, number) for problem in problems if problem.answer is not None
               for number in range(options.tries) if tries.is_missing(finished.get((problem.id, number)))]
    right = {each.id for each in finished.values() if each.right} - measured if options.difficulty_samples else set()
    if not missing and not right:
        print(f"{out} holds all tries of its problems: nothing is left to make")
        return
    async with AsyncExitStack() as stack:
        tools = await open_tools(options, problems, stack)
        done = sum(not tries.is_missing(each) for each in finished.values())
        bar = tqdm(total=done + len(missing), initial=done, unit="try", smoothing=0.1)
        run = Run(options, tools, stack.enter_context(open_to_append(out / tries.TRIES)),
                  stack.enter_context(open_to_append(out / tries.DIFFICULTY)), stack.enter_context(bar), measured,
                  survivors=sum(survives(options, each) for each in finished.values()))
        await in_parallel([partial(run.measure, problem) for problem in problems if problem.id in right]
                          + [partial(run.take, *job) for job in missing], options.concurrency)
    run.report()


@dataclass
class Run:
    """Where finished tries go: written, counted on the progress bar, and their problems' difficulty measured."""

    options: TirgenOptions
    tools: Tools
    file: TextIO
    difficulty_file: TextIO
    bar: tqdm
    measured: set[str]
    survivors: int = 0
    lost_in_a_row: int = 0
    unmeasured: int = 0

    async def take(self, problem: Problem, number: int) -> None:
        """Make one try and write it; too many in a row that servers or the sandbox lost end the run."""
        made = await make_try(self.tools, problem, number)
        whole = made.trajectory
        if whole is not None:
            whole.model, whole.correct = self.options.actor, await grade(whole)
        tries.append_try(self.file, made)
        self.lost_in_a_row = self.lost_in_a_row + 1 if made.reason in tries.LOST else 0
        if self.lost_in_a_row >= MAX_LOST_IN_A_ROW:
            raise ValueError(f"{self.lost_in_a_row} tries in a row were lost ({made.reason}: {made.detail}); the same "
                             "command continues")
        self.survivors += survives(self.options, made)
        self.bar.set_postfix({"survivors": self.survivors}, refresh=False)
        self.bar.update()
        if made.right:
            await self.measure(problem)

    async def measure(self, problem: Problem) -> None:
        """Solve a problem by text alone, once for all of its tries, and write down how often that was right."""
        samples = self.options.difficulty_samples
        if not samples or problem.id in self.measured:
            return
        self.measured.add(problem.id)
        try:
            answers = await asyncio.gather(*(plain_answer(self.tools, problem, sample) for sample in range(samples)))
        except ClientError:
            self.unmeasured += 1
            return
        solved = [await is_right(problem, answer) for answer in answers]
        self.difficulty_file.write(tries.difficulty_line(problem.id, sum(solved), samples) + "\n")
        self.difficulty_file.flush()

    def report(self) -> None:
        """Say aloud what a server kept from being measured."""
        if self.unmeasured:
            print(f"the difficulty of {self.unmeasured} problems could not be measured; the same command tries again")


def survives(options: TirgenOptions, made: Try) -> bool:
    """Whether a try passes the filters that judge a trajectory by itself, as far as it is known yet."""
    return made.trajectory is not None and first_objection(made.trajectory, options.filters, {}) is None


async def in_parallel(jobs: list[Callable[[], Awaitable[None]]], concurrency: int) -> None:
    """Run all jobs, at most `concurrency` at a time, begun in their order; the first that raises ends all."""
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            await job()

    workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(jobs)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def is_right(problem: Problem, answer: str | None) -> bool:
    """Whether an answer is equivalent to the problem's; None is wrong."""
    return await grade(Trajectory(problem.id, 0, problem.question, problem.answer, [], boxed=answer))


def check(options: TirgenOptions) -> None:
    """Raise ValueError for what can be seen to be wrong before anything is loaded."""
    for name, low in (("tries", 1), ("concurrency", 1), ("difficulty_samples", 0), ("threads", 0)):
        if getattr(options, name) < low:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be {low} or more")
    if is_url(options.actor) and options.actor_tokenizer is None:
        raise ValueError("--actor is a URL, so --actor_tokenizer must name the Hugging Face directory of its tokenizer")
    if options.merge and options.filter_only:
        raise ValueError("--merge filters what it has put together; leave --filter_only out")
    if options.filter_only and not (Path(options.out) / tries.TRIES).is_file():
        raise ValueError(f"{options.out} holds no {tries.TRIES} to filter")
    if (options.merge or options.filter_only) and options.shard != "1/1":
        raise ValueError("--shard is for making tries; --merge and --filter_only take all that there are")
    config.check_device(options.device)
    _ = options.loop, options.filters, options.as_critic  # each checks itself


def is_url(spec: str) -> bool:
    """Whether a model is at a server."""
    return spec.startswith(("http://", "https://"))


def of_shard(problems: list[Problem], shard: str) -> list[Problem]:
    """Every n-th problem from the i-th on. Raises ValueError for anything but i/n with i from 1 to n."""
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--shard is {shard!r}; it must be i/n with i from 1 to n")
    return problems[int(index) - 1::int(count)]


def settings_of(options: TirgenOptions) -> tries.Settings:
    """What decides a try. Where a server is and where a file lies does not; what the file says does."""
    settings = {name: value for name, value in dataclasses.asdict(options).items() if name not in NOT_SETTINGS}
    asked = options.as_critic
    return settings | {"actor": "server" if is_url(options.actor) else options.actor,
                       "critic": "server" if is_url(options.critic) else options.critic,
                       "actor_texts": options.actor_texts and digest(options.actor_texts),
                       "actor_tokenizer": options.actor_tokenizer and digest(f"{options.actor_tokenizer}/tokenizer.json"),
                       "solvable_prompt": asked.solvable_prompt, "rewrite_prompt": asked.rewrite_prompt}


def digest(path: str) -> str:
    """What tells one file's contents from another's. ValueError if there is no such file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


async def open_tools(options: TirgenOptions, problems: list[Problem], stack: AsyncExitStack) -> Tools:
    """Load the models or reach the servers, and start the sandbox; `stack` closes them."""
    if options.threads:
        torch.set_num_threads(options.threads)
    texts = None if options.actor_texts is None else read_texts(options.actor_texts, problems)
    instruction = INSTRUCTION if options.instruction is None else options.instruction
    asked = TEXT_INSTRUCTION if options.actor_instruction is None else options.actor_instruction
    tokenizer = options.actor_tokenizer or options.actor
    template = load_template(tokenizer, options.style, instruction, options.system, options.thinking)
    scripted = scripted_critic(options.critic)
    closed_sandbox = open_sandbox(options.sandbox, options.cpu_seconds, options.sandbox_require, options.sandbox_log,
                                  options.sandbox_log_mode)
    sandbox = await stack.enter_async_context(closed_sandbox)
    actor = None
    if texts is None or options.difficulty_samples:
        reach = client_options(options, options.style, None)
        actor = await stack.enter_async_context(open_client(options.actor, reach))
    make_critic = scripted or await open_critic(options, actor, stack)
    return Tools(options.loop, template, dataclasses.replace(template, instruction=asked), actor, make_critic, sandbox,
                 texts)


async def open_critic(options: TirgenOptions, actor: EngineClient | HTTPClient | None,
                      stack: AsyncExitStack) -> Callable[[int], LMCritic]:
    """`make_critic` of a language model. A directory that is the Actor's, too, is loaded once."""
    reach = client_options(options, options.critic_style, options.critic_tokenizer)
    same = (options.critic, options.critic_style) == (options.actor, options.style)
    try:
        client = (actor if isinstance(actor, EngineClient) and same
                  else await stack.enter_async_context(open_client(options.critic, reach)))
    except ValueError as error:
        raise ValueError(f"the Critic {options.critic} (its style is --critic_style): {error}") from None
    return partial(LMCritic, client, options=options.as_critic, render=renderer(client, options.critic_style))


def client_options(options: TirgenOptions, style: str, tokenizer: str | None) -> ClientOptions:
    """How to reach a model; at a server, prompts of the Actor are rendered here, with --actor_tokenizer."""
    return ClientOptions(style=style, device=options.device, dtype=options.dtype, context=options.context,
                         slots=min(options.slots, options.concurrency), tokenizer=tokenizer,
                         key_variable=options.key_variable, concurrency=options.concurrency, timeout=options.timeout,
                         max_retries=options.max_retries, backoff=options.backoff)


def renderer(client: EngineClient | HTTPClient, style: str) -> Callable[[str], str]:
    """What the Critic reads of a question: a chat turn where its template is known and wanted, else the plain text."""
    template = client.template
    if template is None or style == "base":
        return str
    return lambda question: template.render([{"role": "user", "content": question}])


def scripted_critic(spec: str) -> Callable[[int], Critic] | None:
    """`make_critic` of the module that scripted:MODULE names; None for a language model."""
    kind, _, name = spec.partition(":")
    if kind != "scripted":
        return None
    try:
        return importlib.import_module(f"thor.{name or 'toy'}").make_critic
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"--critic {spec}: there is no thor/{name}.py with a make_critic") from None


def read_texts(path: str, problems: list[Problem]) -> dict[str, list[str]]:
    """Problem id -> its written solutions, which the tries take in turn. ValueError for a problem without one."""
    texts: dict[str, list[str]] = {}
    for where, record in read_records(path):
        if not isinstance(record.get("id"), str) or not isinstance(record.get("text"), str):
            raise ValueError(f"{where}: a line of --actor_texts needs a string 'id' and a string 'text'")
        texts.setdefault(record["id"], []).append(record["text"])
    for problem in problems:
        if problem.id not in texts:
            raise ValueError(f"{path} has no text for problem {problem.id!r}")
    return texts


def write_results(options: TirgenOptions, problems: list[Problem], made: dict[tries.Key, Try], out: Path) -> None:
    """Filter the tries, write what is kept and what is not, and print the funnel."""
    place = {problem.id: index for index, problem in enumerate(problems)}
    mine = sorted((each for each in made.values() if each.id in place), key=lambda each: (place[each.id], each.sample))
    difficulty = tries.read_difficulty(out) if options.difficulty_samples else {}
    filtered = filter_tirgen([each.trajectory for each in mine if each.trajectory], options.filters, difficulty)
    tries.write_lines(out / "sft.jsonl", map(to_json, filtered.kept))
    tries.write_lines(out / "rejected.jsonl", rejected_lines(mine, filtered.rejected))
    report = funnel.report(problems, options.source_field, mine, filtered, options.filters, difficulty)
    tries.write_lines(out / "funnel.json", [json.dumps(report, indent=2, ensure_ascii=False)])
    funnel.draw(report, out / "funnel.png")
    print(funnel.table(report))
    if mine and all(each.reason in tries.LOST for each in mine):
        raise ValueError(f"all {len(mine)} tries were lost ({mine[0].reason}: {mine[0].detail}); the same command "
                         "makes them again")


def rejected_lines(made: list[Try], rejected: list[Rejected]) -> Iterator[str]:
    """What was dropped while it was made, as it was written down, then what a filter dropped, with stage and reason."""
    yield from (each.to_json() for each in made if each.trajectory is None)
    for each in rejected:
        why = {"stage": each.stage, "reason": each.reason}
        yield json.dumps(dataclasses.asdict(each.trajectory) | why, ensure_ascii=False)


if __name__ == "__main__":
    config.run(main, TirgenOptions, __doc__)
