"""How fast sampling and training are on one GPU, against ceilings measured in the same run.

    python benchmarks/gpu.py                  # all rows on a GPU, at most nine minutes
    python benchmarks/gpu.py --smoke          # the same rows in a tiny shape on a CPU, to see that they run

Random weights in the shapes of Qwen2.5-1.5B and -7B; needs torch, transformers and numpy. Every row runs in a process
of its own with a time limit, so that one that fails says so and the others go on. What was measured is written after
each row to OUT.json; the table OUT.md and the roofline OUT.png are made of that by gpu_report.py, which can be run
again alone. Times are of the device with everything waited for; the first, slower uses of a kernel are left out.
"""

import asyncio
import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import gap  # noqa: E402
import gpu_peer  # noqa: E402
import gpu_report  # noqa: E402
import gpu_training  # noqa: E402
from gpu_shapes import (  # noqa: E402
    QWEN_1_5B, QWEN_7B, TINY, build_model, key_bytes, layer_bytes, report, seconds_of, some_ids, synchronize)

from thor import config  # noqa: E402
from thor.config import option  # noqa: E402
from thor.engine import Engine, Sequence  # noqa: E402
from thor.model import Decoder, ModelConfig  # noqa: E402
from thor.paged_engine import PagedEngine  # noqa: E402
from thor.sampling import Sampling, noise_key  # noqa: E402

Numbers = dict[str, object]  # what a row measured, as it goes into the JSON


@dataclass
class Options:
    """One flag a field."""

    smoke: bool = option(False, "a tiny shape on the CPU")
    out: str = option("out/gpu", "files OUT.json, OUT.md and OUT.png")
    rows: str = option("", "rows to run, separated by commas; all by default")
    seconds: float = option(530.0, "for everything; what does not fit is reported as not run")
    commit: str | None = option(None, "what to call the commit where git cannot be asked")
    row: str | None = option(None, "used by the script itself: run one row and print JSON")
    failed: str = option("[]", "used by the script itself: what went wrong in the arrangements that were tried before")


@dataclass(frozen=True)
class Bench:
    """Where a row runs and how big it is; what went wrong with the sampler in the processes before this one."""

    smoke: bool
    failed: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The GPU, or a CPU for the smoke test."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and cache."""
        return torch.float32 if self.smoke else torch.bfloat16

    def shape(self, full: ModelConfig) -> ModelConfig:
        """`full`, or the tiny one."""
        return TINY if self.smoke else full

    def size(self, full: int, smoke: int) -> int:
        """A number of tokens or sequences."""
        return smoke if self.smoke else full


def main(options: Options) -> None:
    """Run the rows, each in its own process, and write what they found."""
    if options.row is not None:
        report(ROWS[options.row][0](Bench(options.smoke, tuple(json.loads(options.failed)))))
        return
    names = [name.strip() for name in options.rows.split(",")] if options.rows else list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no row; there are {', '.join(ROWS)}")
    if not options.smoke and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --smoke runs every row on the CPU")
    out, deadline = Path(options.out), time.monotonic() + options.seconds
    out.parent.mkdir(parents=True, exist_ok=True)
    found: Numbers = {"about": about(options.smoke, options.commit)}
    for name in names:
        limit = min(ROWS[name][1], deadline - time.monotonic())
        found[name] = run_row(name, options.smoke, limit)
        out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {found[name].get('trouble', 'done')} ({found[name]['row_seconds']:.0f} s)", flush=True)
    gpu_report.main(gpu_report.Options(str(out.with_suffix(".json"))))


def about(smoke: bool, commit: str | None) -> Numbers:
    """Date, commit, device and versions."""
    device = "CPU, a tiny shape (smoke test)" if smoke else torch.cuda.get_device_name()
    return {"date": date.today().isoformat(), "commit": commit or asked_commit(), "device": device,
            "torch": torch.__version__}


def asked_commit() -> str:
    """What git calls the commit of this file, if there is a git and a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def run_row(name: str, smoke: bool, limit: float) -> Numbers:
    """One row in a fresh process: its numbers, with `trouble` if it ended before its time; always the seconds it took.

    A row prints what it has more than once, so that a part that fails or hangs does not take the rest with it.
    """
    started = time.monotonic()
    if limit < 1:
        return {"trouble": "not run, the time was up", "row_seconds": 0.0}
    process = subprocess.Popen([sys.executable, __file__, "--row", name, "--smoke", str(smoke)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        output, errors = process.communicate(timeout=limit)
        trouble = {"trouble": last_line(errors)} if process.returncode else {}
    except subprocess.TimeoutExpired:
        stop(process)
        output, errors = process.communicate()
        trouble = {"trouble": f"stopped after {limit:.0f} s"}
    finally:
        stop(process)
    return {**last_numbers(output), **trouble, "row_seconds": time.monotonic() - started}


def stop(process: subprocess.Popen) -> None:
    """End a row and what it has started, which would hold its pipes open and the device's memory."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def last_numbers(output: str) -> Numbers:
    """The last line that is JSON."""
    for line in reversed(output.splitlines()):
        try:
            numbers = json.loads(line)
        except ValueError:
            continue
        if isinstance(numbers, dict):
            return numbers
    return {}


def last_line(text: str) -> str:
    """What an error says, without its traceback."""
    lines = [line.strip().removeprefix("error: ") for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return ((errors or lines or ["no message"])[-1])[:300]


def ceilings(bench: Bench) -> Numbers:
    """Bytes a second of a device copy, read and written, and FLOP a second of a large product of random matrices."""
    size, count = bench.size(2**31, 2**22), bench.size(8192, 256)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, count, count, device=bench.device).to(bench.dtype).unbind(0)
    copy = seconds_of(bench.device, lambda: target.copy_(source), 20)
    product = seconds_of(bench.device, lambda: a @ b, 20)
    return {"bytes_per_second": 2 * size / copy, "flops_per_second": 2 * count**3 / product}


ARRANGEMENTS = ({}, {"use_kernels": False}, {"use_kernels": False, "use_graphs": False})


def attempts(bench: Bench, shape: ModelConfig, num_slots: int, max_tokens: int,
             measure: Callable[[PagedEngine], Numbers]) -> Numbers:
    """`measure` on an engine as it should be; if that fails, without kernels, then without graphs, and it says so.

    On a GPU another attempt is another process: after an access to memory that is not its own, one can do nothing more.
    """
    model, errors = build_model(shape, bench.dtype, bench.device), list(bench.failed)
    for arrangement in ARRANGEMENTS[len(errors):]:
        try:
            engine = PagedEngine(model, set(), num_slots, max_tokens, **arrangement)
            return {**measure(engine), **arrangement_of(engine), "errors": errors}
        except Exception as error:  # whatever it is: Triton's errors, for one, are of no kind of Python's own
            errors.append(f"{type(error).__name__}: {error}"[:300])
            engine = None
        gc.collect()
        if bench.device.type == "cuda" and len(errors) < len(ARRANGEMENTS):
            again = [sys.executable, *sys.argv, "--failed", json.dumps(errors)]
            sys.exit(subprocess.run(again, check=False).returncode)
    raise RuntimeError("; ".join(errors))


def arrangement_of(engine: PagedEngine) -> Numbers:
    """What of the engine was in use."""
    return {"kernels": engine.decoder.use_kernels, "graphs": engine.decoder.use_graphs}


def decode_7b(bench: Bench) -> Numbers:
    """One sequence of the 7B shape: every step reads all weights but the embedding, and one sequence's keys."""
    return decoding(bench, bench.shape(QWEN_7B), 1, bench.size(256, 20), bench.size(320, 16))


def decode_1_5b(bench: Bench) -> Numbers:
    """256 sequences of the 1.5B shape at 1,000 to 2,000 tokens: a step reads the weights once and all their keys."""
    return decoding(bench, bench.shape(QWEN_1_5B), bench.size(256, 4), bench.size(1400, 40), bench.size(160, 16))


def decoding(bench: Bench, shape: ModelConfig, batch: int, prompt: int, count: int) -> Numbers:
    """Seconds of a step while all decode, from the first quarter of the tokens on, and the bytes it has to read."""
    rng = random.Random(0)
    lengths = [prompt + (rng.randint(-prompt // 4, prompt // 4) if batch > 1 else 0) for _ in range(batch)]

    def measure(engine: PagedEngine) -> Numbers:
        sequences = [engine.new(some_ids(rng, shape, length), noise_key(i)) for i, length in enumerate(lengths)]
        marks: dict[int, float] = {}
        last = len(sequences[0].ids) + count

        def clock(token: int) -> bool:
            marks[len(sequences[0].ids)] = time.perf_counter()
            return False

        async def everyone() -> None:
            await asyncio.gather(*map(engine.prefill, sequences))
            await asyncio.gather(*(engine.sample(sequence, Sampling(), count, clock if i == 0 else None)
                                   for i, sequence in enumerate(sequences)))

        asyncio.run(everyone())
        first = last - count + max(count // 4, 2)
        step = (marks[last] - marks[first]) / (last - first)
        context = sum(lengths) / batch + (first + last) / 2 - (last - count)
        weights, keys = layer_bytes(shape, bench.dtype), batch * context * key_bytes(shape, bench.dtype)
        numbers = {"step_seconds": step, "batch": batch, "context": context, "weight_bytes": weights, "key_bytes": keys,
                   "tokens_per_second": batch / step, "flops": batch * 2 * weights / bench.dtype.itemsize,
                   **arrangement_of(engine)}
        report(numbers)
        return {**numbers, "profile": profile(bench, engine, sequences)}

    return attempts(bench, shape, batch, max(lengths) + 2 * count, measure)


def profile(bench: Bench, engine: PagedEngine, sequences: list[Sequence]) -> list[str]:
    """The kernels that take most of some further steps' time, with their shares; empty where the profiler fails."""
    async def more() -> None:
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 10) for sequence in sequences))

    return gpu_training.top_kernels(bench.device, lambda: asyncio.run(more()))


def rollout_case(bench: Bench) -> gpu_peer.Case:
    """256 trajectories in groups of eight, four rounds, mixed lengths."""
    return gpu_peer.make_case(bench.shape(QWEN_1_5B).vocab_size, groups=bench.size(32, 2), samples=bench.size(8, 2),
                              prompt=bench.size(300, 12), shortest=bench.size(32, 2), longest=bench.size(256, 8))


def rollouts(bench: Bench) -> Numbers:
    """Tool rollouts with a tool that answers at once, then with a slow one; a first run of either does not count."""
    case, tool_seconds = rollout_case(bench), bench.size(200, 20) / 1000

    def measure(engine: PagedEngine) -> Numbers:
        seconds, counts = {}, {}
        for name, tool in (("warm", 0.0), ("warm, slow", tool_seconds), ("instant", 0.0), ("slow", tool_seconds)):
            before = dataclasses.asdict(engine.counts)
            seconds[name] = timed(bench, lambda: asyncio.run(roll(engine, case, tool)))
            counts[name] = {field: value - before[field] for field, value in dataclasses.asdict(engine.counts).items()}
        return {"tokens": case.num_tokens, "seconds": seconds["instant"], "slow_seconds": seconds["slow"],
                "tool_seconds": len(case.lengths_RN) * tool_seconds, "trajectories": len(case.lengths_RN[0]),
                "counts": counts}

    num_slots = len(case.lengths_RN[0]) + len(case.prompts)
    return attempts(bench, bench.shape(QWEN_1_5B), num_slots, case.longest, measure)


def generate(bench: Bench) -> Numbers:
    """The same by transformers' `generate`, round by round."""
    return gpu_peer.generate(bench.shape(QWEN_1_5B), rollout_case(bench), bench.dtype, bench.device)


def generate_batch(bench: Bench) -> Numbers:
    """The same by transformers' continuous batching."""
    return gpu_peer.generate_batch(bench.shape(QWEN_1_5B), rollout_case(bench), bench.dtype, bench.device)


def timed(bench: Bench, action: Callable[[], object]) -> float:
    """Seconds of one action, with all the device's work."""
    synchronize(bench.device)
    started = time.perf_counter()
    action()
    synchronize(bench.device)
    return time.perf_counter() - started


async def roll(engine: Engine, case: gpu_peer.Case, tool_seconds: float) -> None:
    """Every rollout of the case: sample, call the tool, append the observation, round after round."""
    firsts = [engine.new(ids, noise_key(group)) for group, ids in enumerate(case.prompts)]
    ready = [asyncio.create_task(engine.prefill(first)) for first in firsts]

    async def one(number: int) -> None:
        group, sample = divmod(number, case.samples)
        await ready[group]
        sequence = engine.fork(firsts[group], noise_key(group, sample))
        for lengths_N in case.lengths_RN:
            await engine.sample(sequence, Sampling(), lengths_N[number])
            if tool_seconds:
                await asyncio.sleep(tool_seconds)
            engine.append(sequence, case.observation)
        engine.free(sequence)

    await asyncio.gather(*map(one, range(len(case.prompts) * case.samples)))
    for first in firsts:
        engine.free(first)


def rewind(bench: Bench) -> Numbers:
    """Host time of fork and truncate, what they copy, what a self-correction computes, and the sampler–trainer gap."""
    shape, length = bench.shape(QWEN_1_5B), bench.size(1500, 100)

    def measure(engine: PagedEngine) -> Numbers:
        sequence, suffix = engine.new(some_ids(random.Random(0), shape, length), b"a"), length // 10

        async def corrected() -> tuple[int, int]:
            await engine.sample(sequence, Sampling(), 2 * suffix)
            kept, before = len(sequence.ids) - suffix, engine.counts.fed
            engine.truncate(sequence, kept, b"b")
            await engine.sample(sequence, Sampling(), suffix)
            return engine.counts.fed - before, kept

        computed, kept = asyncio.run(corrected())
        forks, before = [], engine.counts.copied
        fork = host_seconds(64, lambda i: forks.append(engine.fork(sequence, noise_key(i))))
        truncate = host_seconds(64, lambda i: engine.truncate(forks[i], length, noise_key(i, "cut")))
        asyncio.run(sample_all(engine, forks[:16], 2))
        copied = (engine.counts.copied - before) / 16
        page = engine.page_tokens * key_bytes(shape, bench.dtype)
        numbers = {"fork_seconds": fork, "truncate_seconds": truncate, "copied_tokens": copied, "copied_bytes": page,
                   "tokens_computed": computed, "tokens_kept": kept}
        report(numbers)
        return {**numbers, "gap": gaps(bench, engine.model)}

    return attempts(bench, shape, 40, 2 * length, measure)


def host_seconds(count: int, action: Callable[[int], object]) -> float:
    """Mean host time of `count` calls."""
    started = time.perf_counter()
    for i in range(count):
        action(i)
    return (time.perf_counter() - started) / count


async def sample_all(engine: Engine, sequences: list[Sequence], count: int) -> None:
    """So many tokens for each."""
    await asyncio.gather(*(engine.sample(sequence, Sampling(), count) for sequence in sequences))


def gaps(bench: Bench, model: Decoder) -> dict[str, list[float] | str]:
    """Mean and greatest |Δ log-prob| between sampler and trainer by how they are arranged, or why there is none."""
    found: dict[str, list[float] | str] = {}
    rng = random.Random(1)
    prompts = [some_ids(rng, model.config, bench.size(100, 10)) for _ in range(bench.size(32, 4))]
    for name, arrangement in (("as used", {}), ("without kernels", {"use_kernels": False}), (gap.ROUNDED, {})):
        try:
            if name == gap.ROUNDED:
                gap.round_logits(model)
            samples = gap.sample(PagedEngine(model, set(), 32, bench.size(512, 64), **arrangement), prompts,
                                 bench.size(200, 20))
            sampled = torch.tensor([p for sample in samples for p in sample.sampler_logprobs], device=bench.device)
            difference = (gap.scores(model, samples, bench.device) - sampled).abs()
            found[name] = [difference.mean().item(), difference.max().item()]
        except Exception as error:  # as in `attempts`
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def training(bench: Bench) -> Numbers:
    """FLOPs of training steps, and peak memory with chunked and with full logits."""
    shape, sizes = bench.shape(QWEN_1_5B), [64, 128] if bench.smoke else [8192, 16384, 24576, 32768]
    numbers = gpu_training.measure(shape, bench.dtype, bench.device, sizes, bench.size(16384, 64), bench.size(2048, 32))
    return numbers


def compiled(bench: Bench) -> Numbers:
    """The checkpointed pack with torch.compile, in a process of its own since compiling may fail or take long."""
    if bench.smoke:
        raise ValueError("torch.compile is measured on a GPU only")
    return gpu_training.measure_compiled(QWEN_1_5B, bench.dtype, bench.device, 16384, 2048)


# Name -> (row, seconds that it may take)
ROWS = {"ceilings": (ceilings, 60), "decode_7b": (decode_7b, 110), "decode_1_5b": (decode_1_5b, 110),
        "training": (training, 110), "rollouts": (rollouts, 100), "rewind": (rewind, 70), "generate": (generate, 110),
        "generate_batch": (generate_batch, 110), "compiled": (compiled, 80)}

if __name__ == "__main__":
    config.run(main, Options, __doc__)
