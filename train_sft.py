"""Cold start (Eq. 2): maximise the likelihood of thoughts and code, never of what the sandbox printed.

    python train_sft.py --model DIR --data FILE --out DIR

FILE holds trajectories as `tirgen.py` and `generate.py` write them, or {"question", "response"} or {"messages": […]}
lines. The loss is a mean over the trained tokens of a whole optimizer step, the end-of-turn token among them, however
the step is cut into micro-batches. Killed at any moment, the same command goes on as if nothing had happened.
On several devices: torchrun --nproc-per-node N train_sft.py …, with weights and gradients divided over them.
"""

import dataclasses
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from thor import config
from thor.batch import Sample, deal_packs, make_pack, score, trajectory_sample
from thor.checkpoint import StopRequest, load_state, open_run, step_of
from thor.config import option
from thor.data import read_sft
from thor.metrics import MetricsLog
from thor.model import Decoder, compile_layers
from thor.optimizer import SCHEDULES, Skips, check_arithmetic, learning_rate, make_optimizer, take_step
from thor.parallel import Ranks, load_optimizer, load_sharded, open_ranks, save_checkpoint
from thor.template import INSTRUCTION, Template, load_template
from thor.trajectory import Trajectory
from thor.weights import read_config

# What may differ when a run is continued, because no number in metrics.jsonl depends on it.
FREE = ("out", "save_every", "keep", "tensorboard", "replicas")


@dataclass
class SftOptions:
    """One flag a field; the defaults are the paper's. `config.run` makes the command line of it."""

    model: str | None = option(None, "Hugging Face directory of a Llama-, Qwen2- or Qwen3-type model")
    data: str | None = option(None, "JSON lines: trajectories, question and response, or messages")
    out: str | None = option(None, "directory of the run: metrics, checkpoints, latest")
    style: str = option("chat", "of records without tokens; chat: the tokenizer's template; base: plain text")
    system: str | None = option(None, "replaces the chat template's own system text")
    instruction: str | None = option(None, "replaces our instruction on how to solve and how to write code")
    thinking: bool = option(False, "responses are reasoning turns with <think>")
    eval_data: str | None = option(None, "file with held-out records for the evaluation loss")
    eval_share: float = option(0.0, "without --eval_data: share of the questions that is held out")
    eval_every: int = option(50, "optimizer steps between evaluations; the last step is always evaluated")
    epochs: int = option(3, "passes over the data")
    batch: int = option(128, "sequences of one optimizer step")
    max_length: int = option(20000, "tokens of a sequence; longer ones are left out and counted")
    micro_tokens: int = option(16384, "tokens of a forward pass; a longer sequence goes alone")
    lr: float = option(2e-6, "peak learning rate")
    schedule: str = option("constant", "constant or cosine, after the warm-up")
    warmup: float = option(0.05, "share of the steps in which the rate rises from 0")
    beta1: float = option(0.9, "AdamW's first moment")
    beta2: float = option(0.999, "AdamW's second moment")
    weight_decay: float = option(0.0, "of matrices")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    seed: int = option(0, "decides the order of the data and what is held out")
    save_every: int = option(100, "optimizer steps between checkpoints; the last step is always saved")
    keep: int = option(2, "checkpoints that are kept; 0 keeps all")
    device: str = option("cpu", "cpu or cuda")
    replicas: int = option(1, "with torchrun: groups of processes that each hold all weights between them (HSDP)")
    dtype: str = option("float32", "of the arithmetic: float32 or bfloat16; weights and moments are float32")
    checkpoint_layers: bool = option(False, "keep layers' inputs only, compute the rest again in the backward pass")
    compile: bool = option(False, "torch.compile of norms and feed-forward (cuda)")
    offload: bool = option(False, "weights' shares, gradients and moments on the CPU (cuda, bfloat16)")
    threads: int = option(0, "CPU threads of torch; 0 leaves its default")
    tensorboard: bool = option(True, "write TensorBoard files, too")


@dataclass
class Trainer:
    """What a run works with; `skips` and the optimizer's moments go into its checkpoints."""

    options: SftOptions
    model: Decoder
    optimizer: torch.optim.AdamW
    train: list[Sample]
    held_out: list[Sample]
    skips: Skips
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass. Nothing is left out: their sizes differ by at most one sequence."""
        return -(-len(self.train) // self.options.batch)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.options.epochs * self.steps_per_epoch


def main(options: SftOptions) -> None:
    """Train until the last step, from the newest checkpoint if there is one."""
    check(options)
    with open_ranks(options.device, options.replicas, mixed=options.dtype == "bfloat16") as ranks:
        train, held_out = read_samples(options)
        size = {"train_sequences": len(train), "train_tokens": sum(sample.num_trained for sample in train)}
        checkpoint = ranks.first(lambda: open_run(Path(options.out), dataclasses.asdict(options) | size, FREE))
        trainer = make_trainer(options, train, held_out, checkpoint, ranks)
        done = 0 if checkpoint is None else step_of(checkpoint)
        if done < trainer.num_steps:
            train_from(trainer, done)
        elif ranks.is_first:
            print(f"{checkpoint} is the last of {done} steps: nothing left to do")


def train_from(trainer: Trainer, done: int) -> None:
    """The steps after `done`. KeyboardInterrupt, once what was done is saved, if someone asked to stop."""
    options, out, ranks = trainer.options, Path(trainer.options.out), trainer.ranks
    log, begun = MetricsLog(out, done, options.tensorboard) if ranks.is_first else None, time.monotonic()
    with StopRequest() as stop:
        for step in range(done + 1, trainer.num_steps + 1):
            started, last = time.monotonic(), step == trainer.num_steps
            metrics = train_step(trainer, step)
            if trainer.held_out and (last or step % options.eval_every == 0):
                metrics["eval/loss"] = evaluate(trainer)
            if log:
                now = time.monotonic()
                report(trainer, log, step, metrics, now - started, (now - begun) / (step - done))
            stopping = any(ranks.gather(stop.asked))
            if last or stopping or step % options.save_every == 0:
                save(trainer, out, step)
            if stopping:
                raise KeyboardInterrupt
    if log:
        log.close()


def train_step(trainer: Trainer, step: int) -> dict[str, float | int | None]:
    """One optimizer step over its batch: Eq. 2, accumulated over micro-batches with one count of tokens."""
    options, samples = trainer.options, batch_of(trainer, step)
    num_tokens, loss = sum(sample.num_trained for sample in samples), 0.0  # over all ranks: each knows the whole batch
    for members in micro_batches(samples, options.micro_tokens, trainer.ranks):
        share = negative_log_likelihood(trainer, members) / num_tokens  # Eq. 2
        share.backward()
        loss += share.item()
    loss = trainer.ranks.add_up({"loss": loss})["loss"]
    rate = learning_rate(step, trainer.num_steps, options.lr, options.warmup, options.schedule)
    norm = take_step(trainer.model, trainer.optimizer, loss, rate, options.max_grad_norm, trainer.skips)
    if trainer.skips.too_many:
        raise ValueError(broken_down(trainer, step, samples))
    return {"train/loss": loss, "train/grad_norm": norm, "train/lr": rate, "train/sequences": len(samples),
            "train/tokens": num_tokens, "train/epoch": step / trainer.steps_per_epoch,
            "train/skipped": trainer.skips.total}


def negative_log_likelihood(trainer: Trainer, samples: list[Sample]) -> torch.Tensor:
    """− Σ_t log π_θ(r^t, a^t | h^t) over the trained tokens of some sequences, at temperature 1."""
    logprobs, _ = score(trainer.model, make_pack(samples, trainer.options.device))
    return -logprobs.sum()


@torch.no_grad()
def evaluate(trainer: Trainer) -> float:
    """Mean loss of the held-out tokens."""
    packs = micro_batches(trainer.held_out, trainer.options.micro_tokens, trainer.ranks)
    total = sum(negative_log_likelihood(trainer, members).item() for members in packs)
    total = trainer.ranks.add_up({"loss": total})["loss"]
    return total / sum(sample.num_trained for sample in trainer.held_out)


def batch_of(trainer: Trainer, step: int) -> list[Sample]:
    """The sequences of step 1, 2, …: each epoch has an order of its own, a function of seed and epoch alone."""
    epoch, place = divmod(step - 1, trainer.steps_per_epoch)
    order = list(range(len(trainer.train)))
    random.Random(f"{trainer.options.seed} epoch {epoch}").shuffle(order)
    first, end = (len(order) * p // trainer.steps_per_epoch for p in (place, place + 1))
    return [trainer.train[i] for i in order[first:end]]


def micro_batches(samples: list[Sample], token_budget: int, ranks: Ranks) -> list[list[Sample]]:
    """The sequences of each forward pass of this rank; every rank has the same number of them."""
    packs = deal_packs([len(sample.ids) for sample in samples], token_budget, ranks.size)
    return [[samples[i] for i in members] for members in packs[ranks.rank]]


def read_samples(options: SftOptions) -> tuple[list[Sample], list[Sample]]:
    """Sequences to train on and held-out ones; says what is left out for its length. ValueError if nothing is left."""
    instruction = INSTRUCTION if options.instruction is None else options.instruction
    template = load_template(options.model, options.style, instruction, options.system, options.thinking)
    shape = read_config(options.model)
    limit = min(options.max_length, shape.max_context)
    records = read_sft(options.data, template)
    if options.eval_data is not None:
        held_out = read_sft(options.eval_data, template)
    else:
        questions = sorted({record.question for record in records})
        count = max(round(options.eval_share * len(questions)), 1 if options.eval_share else 0)
        chosen = set(random.Random(f"{options.seed} held-out").sample(questions, count))
        held_out = [record for record in records if record.question in chosen]
        records = [record for record in records if record.question not in chosen]
    train, held_out = (as_samples(some, template, shape.vocab_size, options.data) for some in (records, held_out))
    return fitting(train, limit, options.data), fitting(held_out, limit, "the held-out records")


def as_samples(records: list[Trajectory], template: Template, vocab_size: int, name: str) -> list[Sample]:
    """Tokens and masks; a trajectory that was written without its prompt gets the template's.

    Raises ValueError for tokens that the model does not have.
    """
    prompts = [record.prompt_ids or template.prompt_ids(record.question) for record in records]
    samples = [trajectory_sample(dataclasses.replace(record, prompt_ids=prompt))
               for record, prompt in zip(records, prompts, strict=True)]
    largest = max((max(sample.ids) for sample in samples), default=0)
    if largest >= vocab_size:
        raise ValueError(f"{name}: there is a token {largest} and the model has {vocab_size}; the trajectories were "
                         f"made with another tokenizer")
    return samples


def fitting(samples: list[Sample], limit: int, name: str) -> list[Sample]:
    """Those of at most `limit` tokens. ValueError if there were some and none of them fits."""
    kept = [sample for sample in samples if len(sample.ids) <= limit and sample.num_trained]
    if len(kept) < len(samples):
        print(f"{name}: {len(samples) - len(kept)} of {len(samples)} records are longer than {limit} tokens or have "
              f"nothing to train on, and are left out")
    if samples and not kept:
        raise ValueError(f"{name}: none of {len(samples)} records can be trained on within {limit} tokens")
    return kept


def make_trainer(options: SftOptions, train: list[Sample], held_out: list[Sample], checkpoint: Path | None,
                 ranks: Ranks) -> Trainer:
    """Model and optimizer at the beginning, or as they were at `checkpoint`."""
    if not train:
        raise ValueError(f"{options.data}: every record is held out; lower --eval_share")
    if options.threads:
        torch.set_num_threads(options.threads)
    compute_dtype = torch.bfloat16 if options.dtype == "bfloat16" else None
    model = load_sharded(checkpoint or options.model, ranks, options.device, compute_dtype, options.offload)
    model.checkpoint_layers = options.checkpoint_layers
    if options.compile:
        compile_layers(model)
    optimizer = make_optimizer(model, options.lr, (options.beta1, options.beta2), options.weight_decay)
    skips = Skips()
    if checkpoint is not None:
        load_optimizer(ranks, checkpoint, model, optimizer)
        skips = Skips(**load_state(checkpoint)["skips"])
    return Trainer(options, model, optimizer, train, held_out, skips, ranks)


def save(trainer: Trainer, out: Path, step: int) -> None:
    """A checkpoint after `step`. Nothing random is left to save: the data's order is a function of the step."""
    options, state = trainer.options, {"skips": dataclasses.asdict(trainer.skips)}
    save_checkpoint(trainer.ranks, out, step, trainer.model, trainer.optimizer, options.model, state, options.keep)


def broken_down(trainer: Trainer, step: int, samples: list[Sample]) -> str:
    """Write the batch down and say where it is."""
    path = Path(trainer.options.out) / f"not_finite_step_{step}.jsonl"
    lines = (json.dumps({"ids": sample.ids, "trained": sample.trained}) + "\n" for sample in samples)
    trainer.ranks.first(lambda: path.write_text("".join(lines)))
    return (f"loss or gradient was not finite in {trainer.skips.in_a_row} steps in a row; the last batch is in {path}. "
            f"Lower --lr, or look at that batch")


def report(trainer: Trainer, log: MetricsLog, step: int, metrics: dict[str, float | int | None], seconds: float,
           seconds_per_step: float) -> None:
    """A step that took `seconds`, to the log and the console."""
    rate = metrics["train/tokens"] / seconds
    log.write(step, metrics, {"seconds": seconds, "tokens_per_second": rate})
    print(progress(step, trainer.num_steps, metrics, rate, seconds_per_step * (trainer.num_steps - step)), flush=True)


def progress(step: int, num_steps: int, metrics: dict[str, float | int | None], rate: float, left: float) -> str:
    """One line for the console; `rate` in trained tokens per second, `left` in seconds."""
    held_out = f" · eval loss {metrics['eval/loss']:.4f}" if "eval/loss" in metrics else ""
    return (f"step {step}/{num_steps} · loss {metrics['train/loss']:.4f}{held_out} · "
            f"grad {metrics['train/grad_norm']:.2f} · lr {metrics['train/lr']:.1e} · "
            f"{rate:.0f} tokens/s · {int(left) // 60}:{int(left) % 60:02d} left")


def check(options: SftOptions) -> None:
    """ValueError for what can be seen to be wrong before anything is loaded."""
    for name in ("model", "data", "out"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    for name in ("epochs", "batch", "max_length", "micro_tokens", "eval_every", "save_every"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be 1 or more")
    for name in ("threads", "keep", "weight_decay"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be 0 or more")
    for name in ("warmup", "eval_share", "beta1", "beta2"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least 0 and below 1")
    for name in ("lr", "max_grad_norm"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be above 0")
    if options.schedule not in SCHEDULES:
        raise ValueError(f"schedule is {options.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    check_arithmetic(options.device, options.dtype, options.compile, options.offload)
    config.check_device(options.device)


if __name__ == "__main__":
    config.run(main, SftOptions, __doc__)
