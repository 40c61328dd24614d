"""Hierarchical RL (method, section 4): trajectories learn from right answers, failed code steps from code that runs.

    python train_rl.py --model DIR --problems FILE --out DIR

One round: sample G trajectories of each problem, grow G' branches from failed steps, filter, score with π_old, update.
Killed at any moment, the same command continues from the last checkpoint as if nothing had happened.
On several devices: torchrun --nproc-per-node N train_rl.py …; thor/parallel.py says what they share.
"""

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from thor import config
from thor.batch import Sample, branch_sample, deal_packs, loss_tokens, make_pack, score, trajectory_sample
from thor.checkpoint import StopRequest, load_state, open_run
from thor.config import option
from thor.data import Problem, read_problems
from thor.dump import RoundDump
from thor.engine import Engine, warn_if_inexact
from thor.filters import Kept, TrajectoryFilters, branch_reward, filter_branches, filter_trajectories, stop_if_lost
from thor.grpo import Counts, LossOptions, count_tokens, group_advantages, hierarchical_loss, loss_statistics
from thor.metrics import MetricsLog
from thor.model import Decoder, compile_layers
from thor.optimizer import Skips, check_arithmetic, make_optimizer, take_step
from thor.paged_engine import make_engine, release_memory
from thor.parallel import Ranks, full_copy, load_optimizer, load_sharded, open_ranks, save_checkpoint
from thor.quirks import loosened, parse_quirks, random_success, with_misplaced_mask, with_pad
from thor.reward import grade, trajectory_reward
from thor.rl_evaluation import Evaluation, evaluate
from thor.rl_metrics import all_executions, step_metrics, trajectory_metrics
from thor.rollout import FailedStep, RolloutOptions, Tools, branch_group, failed_step, solve_group
from thor.sampling import Sampling
from thor.sandbox import LocalSandbox, open_sandbox
from thor.template import INSTRUCTION, TEXT_INSTRUCTION, Template, load_template, stop_ids
from thor.trajectory import Trajectory

Groups = list[list[Sample]]


@dataclass
class TrainOptions:
    """One flag a field. Defaults are the paper's where it names them (method, section 7)."""

    model: str = config.required("Hugging Face directory to start from")
    problems: str = config.required("JSON lines with id, question and answer")
    out: str = config.required("directory of the run")
    style: str = option("chat", "chat: the tokenizer's template; base: plain text")
    system: str | None = option(None, "replaces the chat template's own system text")
    instruction: str | None = option(None, "replaces our instruction on how to solve and how to write code")
    thinking: bool = option(False, "ask a reasoning model for a <think> turn")
    rounds: int = option(100, "rounds of sampling and updating")
    problems_per_round: int = option(128, "problems sampled at a time")
    samples: int = option(16, "G, trajectories of each problem")
    branches: int = option(16, "G', branches of each failed step; 0 leaves the step level out")
    updates_per_round: int = option(40, "optimizer steps on a round's samples")
    groups_per_round: int = option(0, "dynamic sampling: sample until so many groups survive; 0 takes what one pass gives")
    max_passes: int = option(4, "passes of dynamic sampling at most")
    temperature: float = option(1.0, "of sampling and of every log-prob")
    top_p: float = option(1.0, "must be 1: the ratio of Eq. 4 is that of full distributions")
    top_k: int = option(0, "must be 0, likewise")
    max_response_tokens: int = option(3200, "tokens of a response")
    max_code_rounds: int = option(5, "code blocks of a response; 0 trains on text alone")
    suffix_tokens: int = option(100, "L_suf, tokens of reasoning before the code that a branch samples again")
    max_branch_tokens: int = option(0, "tokens of a branch; 0 is L_suf + 512")
    min_response_tokens: int = option(150, "shorter trajectories are removed; 0 is off")
    box_within_last: int = option(100, "a box must stand within so many last tokens; 0 is off")
    min_group_fraction: float = option(0.5, "a group is kept if so many of its trajectories survive")
    lr: float = option(1e-6, "learning rate of AdamW, constant")
    beta2: float = option(0.999, "AdamW's second decay")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    clip_low: float = option(0.2, "ε_low of Eq. 5")
    clip_high: float = option(0.28, "ε_high of Eq. 5")
    dual_clip: float = option(3.0, "c of Eq. 5; 0 is off")
    nll_weight: float = option(0.01, "α of Eq. 7")
    step_weight: float = option(1.0, "λ of Eq. 8")
    joint: bool = option(False, "one normaliser over trajectories and branches, as the released code has it")
    quirk: str = option("", "the released code's behaviours, by name, separated by commas (docs/departures.md)")
    code_only: bool = option(False, "train branches on their code alone, not on the suffix before it")
    no_std: bool = option(False, "advantages without division by the standard deviation (Dr. GRPO)")
    sequence_ratio: bool = option(False, "one ratio a sequence (GSPO)")
    importance_cap: float = option(0.0, "truncated weights for the gap between sampler and trainer; 0 is off")
    kl_weight: float = option(0.0, "KL to the starting model")
    entropy_weight: float = option(0.0, "entropy bonus")
    eval_problems: str | None = option(None, "problems for periodic evaluation, one sample each")
    eval_every: int = option(0, "rounds between evaluations; 0 is never")
    dump_every: int = option(0, "rounds between dumps of all samples and tokens (docs/audit.md); 0 is never")
    save_every: int = option(1, "rounds between checkpoints")
    keep: int = option(2, "checkpoints that are kept")
    seed: int = option(0, "run seed")
    slots: int = option(64, "sequences in the sampler's memory at once")
    pack_tokens: int = option(16384, "tokens of one forward pass in training")
    sandbox: str = option("local", "local, or URLs of a sandbox service, separated by commas")
    sandbox_require: str = option("best", "isolation of code run here: best (there is), strict (all or none) or basic")
    sandbox_log: str | None = option(None, "file that executions are appended to, or answered from (docs/sandbox.md)")
    sandbox_log_mode: str = option("record", "record, replay (run nothing) or cache (run what is deterministic once)")
    cpu_seconds: float = option(10.0, "CPU time of one code block, past which it has failed")
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", "of arithmetic and sampler: float32 or bfloat16; weights and moments are float32")
    checkpoint_layers: bool = option(False, "keep layers' inputs only, compute the rest again in the backward pass")
    compile: bool = option(False, "torch.compile of norms and feed-forward (cuda)")
    offload: bool = option(False, "weights' shares, gradients and moments on the CPU (cuda, bfloat16)")
    replicas: int = option(1, "with torchrun: groups of processes that each hold all weights between them (HSDP)")
    threads: int = option(0, "CPU threads of torch; 0 leaves its default")

    def __post_init__(self) -> None:
        lowest = dict(rounds=1, problems_per_round=1, samples=2, branches=0, updates_per_round=1, groups_per_round=0,
                      max_passes=1, max_branch_tokens=0, save_every=1, keep=1, slots=1, pack_tokens=1, threads=0,
                      eval_every=0, dump_every=0)
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {low} or more")
        if self.dual_clip != 0 and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be above 1, and 0 is off")
        if self.branches == 1:
            raise ValueError("branches is 1; a group needs 2 or more, and 0 leaves the step level out")
        if self.temperature <= 0 or self.top_p != 1 or self.top_k != 0:
            raise ValueError("training samples at temperature > 0 with top_p 1 and top_k 0: anything else makes the ratio "
                             f"of Eq. 4 wrong (got {self.temperature}, {self.top_p}, {self.top_k})")
        for name in ("lr", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        _ = self.filters, self.rollout(0)  # each checks itself
        self.joint = self.joint or "mixed_normaliser" in self.quirks
        check_arithmetic(self.device, self.dtype, self.compile, self.offload)

    @property
    def quirks(self) -> frozenset[str]:
        """Names of thor/quirks.py."""
        return parse_quirks(self.quirk)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of arithmetic and sampler, where it is not the weights'."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    @property
    def branch_limit(self) -> int:
        """Tokens of a branch."""
        return self.max_branch_tokens or self.suffix_tokens + 512

    def rollout(self, number: int) -> RolloutOptions:
        """How round `number` samples: no self-correction, and a failure ends the trajectory."""
        return RolloutOptions(Sampling(self.temperature), self.max_response_tokens, self.max_code_rounds, 0,
                              self.suffix_tokens, stop_at_failure=True, seed=self.seed, round=number)

    @property
    def filters(self) -> TrajectoryFilters:
        """What a trajectory must be to count."""
        return TrajectoryFilters(self.min_response_tokens, self.box_within_last, self.min_group_fraction,
                                 1 if "lone_reward" in self.quirks else 2)

    def evaluation(self, problems: list[Problem], ranks: Ranks) -> Evaluation:
        """How the evaluation problems are solved: as in training, with noise of its own."""
        return Evaluation(problems, replace(self.rollout(0), seed=self.seed + 1), self.branches, self.branch_limit,
                          self.slots, Path(self.out) if ranks.is_first else None, ranks.spread)

    @property
    def loss(self) -> LossOptions:
        """The part that the loss reads."""
        return LossOptions(self.clip_low, self.clip_high, self.dual_clip or None, self.nll_weight, self.step_weight,
                           self.joint, self.sequence_ratio, self.importance_cap or None, self.kl_weight,
                           self.entropy_weight)


@dataclass
class State:
    """Where the run stands: rounds done, problems drawn, groups carried to the next round, steps taken and left out."""

    round: int = 0
    drawn: int = 0
    carried: Groups = field(default_factory=list)
    updates: int = 0
    skips: Skips = field(default_factory=Skips)


@dataclass
class Run:
    """Everything that a round works with; `state` is what a checkpoint holds beside weights and optimizer."""

    options: TrainOptions
    problems: list[Problem]
    eval_problems: list[Problem]
    template: Template
    model: Decoder
    reference: Decoder | None
    optimizer: torch.optim.AdamW
    ranks: Ranks = field(default_factory=Ranks)
    state: State = field(default_factory=State)


@dataclass(frozen=True)
class Sampled:
    """What a round samples before it learns: all trajectories, those kept, the failed steps that were branched, and all
    branches, a group for each of these; the metrics of the evaluation."""

    drawn: list[list[Trajectory]]
    kept: Kept
    num_failures: int
    chosen: list[FailedStep]
    branches: list[list[Trajectory]]
    evaluation: dict[str, float | None]


def main(options: TrainOptions) -> None:
    """Rounds of: sample, branch, filter, score, update."""
    config.check_device(options.device)
    with open_ranks(options.device, options.replicas, mixed=options.dtype == "bfloat16") as ranks:
        run, out = begin(options, ranks), Path(options.out)
        if run.state.round >= options.rounds:
            if ranks.is_first:
                print(f"{out} has all {options.rounds} rounds: nothing left to do")
            return check_trained(run, out)
        sampler = build_engine(run)  # together: on a mesh its weights are gathered
        if ranks.is_first:
            warn_if_inexact(sampler)
        del sampler  # each round builds its own
        with StopRequest() as stop:
            stopped = asyncio.run(train(run, out, stop))
        if stopped:
            raise KeyboardInterrupt
        check_trained(run, out)


async def train(run: Run, out: Path, stop: StopRequest) -> bool:
    """Rounds until there were enough, or until someone asked to stop, which it returns; one sandbox for all of them."""
    options, stopping = run.options, False
    log = MetricsLog(out, run.state.round) if run.ranks.is_first else None
    async with open_sandbox(options.sandbox, options.cpu_seconds, options.sandbox_require, options.sandbox_log,
                            options.sandbox_log_mode) as sandbox:
        with tqdm(total=options.rounds, initial=run.state.round, unit="round", disable=log is None) as bar:
            while run.state.round < options.rounds and not stopping:
                metrics, timing = await one_round(run, sandbox, run.state.round + 1)
                run.state.round += 1
                if log:
                    log.write(run.state.round, metrics, timing)
                stopping = any(run.ranks.gather(stop.asked))
                if run.state.round % options.save_every == 0 or run.state.round == options.rounds or stopping:
                    save(run, out)
                show(bar, metrics, timing)
    if log:
        log.close()
    return stopping


def check_trained(run: Run, out: Path) -> None:
    """A run that trained nothing does not end as if it had."""
    if run.state.updates == 0:
        raise ValueError("no round had a group to train on: all rewards were equal, or the filters removed everything "
                         f"(see {out / 'metrics.jsonl'})")


async def one_round(run: Run, sandbox: LocalSandbox, number: int) -> tuple[dict[str, float | None], dict[str, float]]:
    """One round of method, section 4: its metrics, and its times, which are the first rank's."""
    rng, started = random.Random(f"{run.options.seed} {number}"), time.perf_counter()
    release_memory(run.options.device)
    tools = Tools(build_engine(run), sandbox, run.template)  # new weights: nothing that was cached is valid
    sampled = await sample_round(run, tools, number, rng)
    counts, done = tools.engine.counts, time.perf_counter()
    del tools  # the memory of cache and, with several ranks, weights
    release_memory(run.options.device)
    metrics = learn(run, sampled, number, rng)
    executions = all_executions(sampled.drawn + sampled.branches)
    return metrics, {"time/sample": counts.seconds, "time/execute": done - started - counts.seconds,
                     "time/train": time.perf_counter() - done, "sandbox/seconds": sum(each.seconds for each in executions),
                     "sandbox/executions": len(executions), **run.ranks.add_up({
                         "engine/sampled": counts.sampled, "engine/fed": counts.fed, "engine/evicted": counts.evicted})}


async def sample_round(run: Run, tools: Tools, number: int, rng: random.Random) -> Sampled:
    """Trajectories, branches, and the evaluation if it is due."""
    drawn, kept, failures = await sample_groups(run, tools, number)  # section 4.1
    chosen = choose_failures(run, tools, failures, rng)  # section 4.2
    if "success_branch" in run.options.quirks and run.options.branches and not chosen:
        chosen = random_success(tools, drawn, run.options.suffix_tokens, rng)
    branches = await grow_branches(run, tools, chosen, number)
    due = is_due(run.options.eval_every, number)
    evaluation = await evaluate(tools, run.options.evaluation(run.eval_problems, run.ranks), number) if due else {}
    return Sampled(drawn, kept, len(failures), chosen, branches, evaluation)


def learn(run: Run, sampled: Sampled, number: int, rng: random.Random) -> dict[str, float | None]:
    """Filter, score with π_old, update; the round's metrics, and its dump if that is due."""
    options, drawn, kept, branches = run.options, sampled.drawn, sampled.kept, sampled.branches
    grown = filter_branches(branches, "no_code_passes" in options.quirks)
    fresh, steps = trajectory_groups(kept.groups, options), branch_groups(grown.groups, options, run.template)
    score_old(run, fresh + steps)
    dump = RoundDump(number) if is_due(options.dump_every, number) else None
    if dump:
        dump.drawn(drawn, kept, fresh)
        dump.grown(branches, grown, steps, sampled.chosen)
        dump.carried(run.state.carried)
    used, carried = choose_groups(run.state.carried, fresh, options.groups_per_round)
    run.state.carried = [group for group in carried if any(group is new for new in fresh)]  # at most one round old
    updates = update(run, used, steps, rng, dump)
    metrics = trajectory_metrics(drawn) | kept.counts | {
        "trajectory/groups_used": len(used), "trajectory/groups_carried": len(run.state.carried),
        "trajectory/groups_too_old": len(carried) - len(run.state.carried)}
    metrics |= step_metrics(branches, sampled.num_failures, run.template) | grown.counts | updates | sampled.evaluation
    if dump:
        dump.write(Path(options.out), dataclasses.asdict(options), run.template.tokenizer.eos_token_id,
                   run.state.carried, metrics)
    return metrics


def is_due(every: int, number: int) -> bool:
    """Whether it is the turn of what happens every so many rounds; 0 is never."""
    return every > 0 and number % every == 0


def choose_groups(carried: Groups, fresh: Groups, wanted: int) -> tuple[Groups, Groups]:
    """(groups of this round, surplus); the carried ones first, since they get no other chance. 0 wanted takes all."""
    usable = carried + fresh
    return (usable[:wanted], usable[wanted:]) if wanted else (usable, [])


async def sample_groups(run: Run, tools: Tools, number: int) -> tuple[list[list[Trajectory]], Kept, list[FailedStep]]:
    """G graded trajectories of each problem, until enough groups survive the filters or the passes are spent."""
    options, drawn, held = run.options, [], []
    for _ in range(options.max_passes if options.groups_per_round else 1):
        drawn += await sample_problems(run, tools, next_problems(run), number, held)
        kept = filter_trajectories(drawn, options.filters, run.template.decode)
        if len(run.state.carried) + len(kept.groups) >= options.groups_per_round:
            break
    stop_if_lost(drawn, "trajectories", number)
    return drawn, kept, all_failures(drawn, held, options.rollout(number)) if options.branches else []


def all_failures(drawn: list[list[Trajectory]], held: list[FailedStep], rollout: RolloutOptions) -> list[FailedStep]:
    """The failed steps of all ranks, in order of trajectory; those in another rank's engine have no sequence."""
    here = {id(failed.trajectory): failed for failed in held}
    failed = [trajectory for group in drawn for trajectory in group if trajectory.finish == "failed"]
    return [here.get(id(trajectory)) or failed_step(trajectory, None, rollout) for trajectory in failed]


def next_problems(run: Run) -> list[tuple[Problem, int]]:
    """The next problems of a seeded shuffle of each epoch, with the epoch's number, which keeps two copies apart."""
    chosen, total = [], len(run.problems)
    for place in range(run.state.drawn, run.state.drawn + run.options.problems_per_round):
        epoch, index = divmod(place, total)
        order = random.Random(f"{run.options.seed} epoch {epoch}").sample(range(total), total)
        chosen.append((run.problems[order[index]], epoch))
    run.state.drawn += run.options.problems_per_round
    return chosen


async def sample_problems(run: Run, tools: Tools, chosen: list[tuple[Problem, int]], number: int,
                          held: list[FailedStep]) -> list[list[Trajectory]]:
    """One group for each problem, in order, graded, whichever rank's work; failed steps stay in the memory of the
    engine that sampled them and go to `held` there."""
    options, rollout, gate = run.options, run.options.rollout(number), asyncio.Semaphore(run.options.slots)

    async def solve(problem_and_epoch: tuple[Problem, int], ended: Callable[[], None]) -> list[Trajectory]:
        (problem, epoch), group = problem_and_epoch, []

        async def done(trajectory: Trajectory) -> None:
            ended()
            trajectory.correct = await grade(trajectory)
            group.append(trajectory)

        samples = list(range(epoch * options.samples, (epoch + 1) * options.samples))
        await solve_group(tools, problem, samples, rollout, gate, done, held if options.branches else None)
        return sorted(group, key=lambda trajectory: trajectory.sample)

    return await run.ranks.spread(chosen, solve, options.slots, options.samples)


def choose_failures(run: Run, tools: Tools, failures: list[FailedStep], rng: random.Random) -> list[FailedStep]:
    """At most as many failures as problems in the round, drawn uniformly, in order; the others leave the memory."""
    chosen = sorted(rng.sample(range(len(failures)), min(len(failures), run.options.problems_per_round)))
    for place in set(range(len(failures))) - set(chosen):
        if failures[place].sequence is not None:
            tools.engine.free(failures[place].sequence)
    kept = [failures[place] for place in chosen]
    loose = "loose_anchor" in run.options.quirks
    return [loosened(failed, run.options.suffix_tokens) for failed in kept] if loose else kept


async def grow_branches(run: Run, tools: Tools, failures: list[FailedStep], number: int) -> list[list[Trajectory]]:
    """G' branches of each of `failures`, by the rank whose engine holds it."""
    options = run.options
    gate, rollout = asyncio.Semaphore(options.slots), options.rollout(number)
    held = [place for place, failed in enumerate(failures) if failed.sequence is not None]
    here = await asyncio.gather(*(branch_group(
        tools, failures[place], options.branches, options.branch_limit, rollout, gate) for place in held))
    grown = run.ranks.collect(dict(zip(held, here, strict=True)), len(failures))
    stop_if_lost(grown, "branches", number)
    return grown


def trajectory_groups(groups: list[list[Trajectory]], options: TrainOptions) -> Groups:
    """Surviving trajectories as samples with their advantages (Eq. 3)."""
    made = [[trajectory_sample(trajectory, advantage) for trajectory, advantage in zip(
        group, advantages_of([trajectory_reward(t) for t in group], options), strict=True)] for group in groups]
    if "misplaced_mask" in options.quirks:
        return [[with_misplaced_mask(*pair) for pair in zip(*both, strict=True)] for both in zip(made, groups, strict=True)]
    return made


def branch_groups(groups: list[list[Trajectory]], options: TrainOptions, template: Template) -> Groups:
    """Surviving branches as samples with their advantages (Eq. 3 over R')."""
    made = [[branch_sample(branch, advantage, options.code_only) for branch, advantage in zip(
        group, advantages_of([branch_reward(b) for b in group], options), strict=True)] for group in groups]
    if "pad_after_code" in options.quirks:
        return [[with_pad(sample, template.tokenizer.eos_token_id) for sample in group] for group in made]
    return made


def advantages_of(rewards: list[float], options: TrainOptions) -> list[float]:
    """Eq. 3 of one group."""
    if len(rewards) == 1 and "lone_reward" in options.quirks:
        return rewards
    rewards_N = torch.tensor(rewards, dtype=torch.float64)
    return group_advantages(rewards_N, torch.zeros(len(rewards), dtype=torch.int64), not options.no_std).tolist()


@torch.no_grad()
def score_old(run: Run, groups: Groups) -> None:
    """log π_old of every new sample, by the trainer, with the weights that sampled it (in place, in `groups`)."""
    places, scored = [(group, index) for group in groups for index in range(len(group))], {}
    packs = deal_packs([len(group[index].ids) for group, index in places], run.options.pack_tokens, run.ranks.size)
    for members in packs[run.ranks.rank]:
        samples = [places[place][0][places[place][1]] for place in members]
        logprobs = score(run.model, make_pack(samples, run.options.device), run.options.temperature)[0].tolist()
        for place, sample in zip(members, samples, strict=True):
            scored[place] = logprobs[:sample.num_trained]
            del logprobs[:sample.num_trained]
    for (group, index), logprobs in zip(places, run.ranks.collect(scored, len(places)), strict=True):
        group[index] = replace(group[index], old_logprobs=logprobs)


def update(run: Run, trajectories: Groups, branches: Groups, rng: random.Random,
           dump: RoundDump | None = None) -> dict[str, float | None]:
    """The round's optimizer steps: groups shuffled and dealt whole and evenly, none left out, no step without any."""
    rng.shuffle(trajectories)
    rng.shuffle(branches)
    num_steps = min(run.options.updates_per_round, len(trajectories) or len(branches))
    sums: dict[str, float] = {}
    for step in range(num_steps):
        groups = trajectories[step::num_steps] + branches[step::num_steps]
        for name, value in optimizer_step(run, [sample for group in groups for sample in group], dump).items():
            combine = max if name.endswith("_max") else float.__add__
            sums[name] = combine(sums[name], float(value)) if name in sums else float(value)
    tokens = max(sums.get("tokens", 0.0), 1.0)
    return {"policy/updates": num_steps, "policy/skipped": int(sums.get("skipped", 0)),
            "policy/loss": sums["loss"] / num_steps if num_steps else None,
            "policy/grad_norm": sums["grad_norm"] / num_steps if num_steps else None,
            "policy/clip_fraction": (sums["clipped_low"] + sums["clipped_high"]) / tokens if num_steps else None,
            "policy/sampler_gap_max": sums.get("sampler_gap_max"),
            **{f"policy/{name}": sums[name] / tokens if num_steps else None
               for name in ("clipped_low", "clipped_high", "kl_old", "ratio", "logprob", "sampler_gap")}}


def optimizer_step(run: Run, samples: list[Sample], dump: RoundDump | None = None) -> dict[str, float]:
    """Eq. 8 over `samples`: one global count, then each pack adds its share to the gradient."""
    options, loss_options, pack_means = run.options, run.options.loss, "pack_means" in run.options.quirks
    packs = deal_packs([len(sample.ids) for sample in samples], options.pack_tokens, run.ranks.size)
    members = [[samples[place] for place in pack] for pack in packs[run.ranks.rank]]
    laid = [make_pack(group, options.device) for group in members]
    tokens = [loss_tokens(group, pack) for group, pack in zip(members, laid, strict=True)]
    counts, sums = sum(run.ranks.gather(sum(map(count_tokens, tokens), Counts())), Counts()), {"loss": 0.0}
    for group, pack, known in zip(members, laid, tokens, strict=True):
        logprobs, entropies = score(run.model, pack, options.temperature, with_entropy=options.entropy_weight != 0)
        with torch.no_grad():
            reference = None if run.reference is None else score(run.reference, pack, options.temperature)[0]
        given = (logprobs, known, count_tokens(known) if pack_means else counts, loss_options, reference, entropies)
        loss = hierarchical_loss(*given) / (len(laid) if pack_means else 1)
        loss.backward()
        if dump:
            dump.pack(group, *given)
        sums["loss"] += loss.item()
        for name, value in loss_statistics(logprobs, known, loss_options).items():
            sums[name] = max(sums.get(name, 0.0), value) if name.endswith("_max") else sums.get(name, 0.0) + value
    sums = run.ranks.add_up(sums)
    norm = take_step(run.model, run.optimizer, sums["loss"], options.lr, options.max_grad_norm, run.state.skips)
    skipped = run.state.skips.in_a_row > 0
    if dump:
        dump.update(counts, sums, norm, skipped)
    stop_if_broken_down(run, samples)
    run.state.updates += not skipped
    return sums | {"grad_norm": norm, "skipped": int(skipped)}


def stop_if_broken_down(run: Run, samples: list[Sample]) -> None:
    """ValueError after too many steps in a row that were not finite, the last one's samples written down."""
    if run.state.skips.too_many:
        path = Path(run.options.out) / "bad_batch.jsonl"
        lines = [json.dumps(dataclasses.asdict(sample)) + "\n" for sample in samples]
        run.ranks.first(lambda: path.write_text("".join(lines)))
        raise ValueError(f"the loss or its gradient was not finite {run.state.skips.in_a_row} steps in a row; the last "
                         f"batch is in {path}")


def build_engine(run: Run) -> Engine:
    """The sampler over the weights as they are now; slots beyond those that run keep failed steps and first samples."""
    options = run.options
    longest = max(len(run.template.prompt_ids(problem.question)) for problem in run.problems + run.eval_problems)
    if longest >= run.model.config.max_context:
        raise ValueError(f"a prompt of {longest} tokens does not fit the model's context of {run.model.config.max_context}")
    context = min(longest + options.max_response_tokens + options.branch_limit, run.model.config.max_context)
    sampler = full_copy(run.model, options.compute_dtype, options.device)
    return make_engine(sampler, stop_ids(run.template.tokenizer, options.model), 2 * options.slots, context)


def begin(options: TrainOptions, ranks: Ranks = Ranks()) -> Run:
    """Model, data and optimizer, from the last checkpoint if there is one."""
    check_ranks(options, ranks)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    instruction = options.instruction
    if instruction is None:
        instruction = INSTRUCTION if options.max_code_rounds else TEXT_INSTRUCTION
    template = load_template(options.model, options.style, instruction, options.system, options.thinking)
    problems, evaluation = (read_graded(path) for path in (options.problems, options.eval_problems))
    if options.eval_every and not evaluation:
        raise ValueError("--eval_every needs --eval_problems")
    start = ranks.first(lambda: open_run(Path(options.out), dataclasses.asdict(options), RESUMABLE))
    model, reference = (directory and load_sharded(directory, ranks, options.device, options.compute_dtype, options.offload)
                        for directory in (start or options.model, options.model if options.kl_weight else None))
    model.checkpoint_layers = options.checkpoint_layers
    if options.compile:
        compile_layers(model)
    optimizer = make_optimizer(model, options.lr, (0.9, options.beta2), 0.0)
    run = Run(options, problems, evaluation, template, model, reference, optimizer, ranks)
    if start:
        load_optimizer(ranks, start, model, optimizer)
        run.state = read_state(load_state(start)["state"])
    return run


def check_ranks(options: TrainOptions, ranks: Ranks) -> None:
    """ValueError for what only one process can do."""
    alone = {"dump_every": options.dump_every > 0, "sandbox_log": options.sandbox_log is not None,
             "quirk": not options.quirks.isdisjoint({"pack_means", "success_branch"})}
    for name, given in alone.items():
        if given and ranks.size > 1:
            raise ValueError(f"{name} is {getattr(options, name)!r} and there are {ranks.size} processes; it needs one: "
                             "leave it out, or start without torchrun")


def read_state(saved: dict) -> State:
    """A State from what `dataclasses.asdict` made of it."""
    carried = [[Sample(**sample) for sample in group] for group in saved["carried"]]
    return State(**{**saved, "carried": carried, "skips": Skips(**saved["skips"])})


# What may differ between a run and its continuation, because no number in metrics.jsonl depends on it.
RESUMABLE = ("out", "rounds", "dump_every", "save_every", "keep", "slots", "sandbox", "sandbox_require", "sandbox_log",
             "sandbox_log_mode", "replicas")


def read_graded(path: str | None) -> list[Problem]:
    """Problems that all have an answer; none without a path."""
    problems = read_problems(path) if path else []
    without = [problem.id for problem in problems if problem.answer is None]
    if without:
        raise ValueError(f"{path}: problem {without[0]!r} has no answer, so its solutions cannot be rewarded")
    return problems


def save(run: Run, out: Path) -> None:
    """A checkpoint of everything that the next round depends on."""
    options, state = run.options, {"state": dataclasses.asdict(run.state)}
    save_checkpoint(run.ranks, out, run.state.round, run.model, run.optimizer, options.model, state, options.keep)


def show(bar: tqdm, metrics: dict[str, float | None], timing: dict[str, float]) -> None:
    """One round further on the progress line."""
    short = {"accuracy": metrics["trajectory/accuracy"], "pass": metrics["trajectory/pass_rate"],
             "branch pass": metrics["step/pass_rate"], "groups": metrics["trajectory/groups_used"]}
    rate = timing["engine/sampled"] / max(timing["time/sample"] + timing["time/execute"], 1e-9)
    bar.set_postfix({name: "–" if value is None else f"{value:.3g}" for name, value in short.items()} | {
        "tokens/s": f"{rate:.0f}"}, refresh=False)
    bar.update()


if __name__ == "__main__":
    config.run(main, TrainOptions, __doc__)
