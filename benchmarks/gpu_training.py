"""The training rows of gpu.py: FLOPs of a step over the ceiling's, peak memory, and which kernels take the time.

FLOPs are the model's, 6 a weight and token and those of causal attention; what is computed a second time to save memory
does not count. A step is forward, loss and backward of one pack, as train_rl.py runs many of them for one update.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from gpu_shapes import build_model, layer_bytes, peak_memory, report, reset_peak, synchronize  # noqa: E402

from thor.attention import packed  # noqa: E402
from thor.batch import Pack, Sample, loss_tokens, make_pack, score  # noqa: E402
from thor.grpo import LossOptions, count_tokens, hierarchical_loss  # noqa: E402
from thor.model import Decoder, ModelConfig, compile_layers  # noqa: E402

PROMPT_SHARE = 8  # one token of so many is prompt, and not trained
TIMED_STEPS = 3
TOP_KERNELS = 8


def some_samples(shape: ModelConfig, num_tokens: int, sequence_tokens: int) -> list[Sample]:
    """Sequences of random tokens with a prompt and an advantage, every second one negative."""
    ids = torch.randint(shape.vocab_size, (num_tokens // sequence_tokens, sequence_tokens),
                        generator=torch.Generator().manual_seed(0)).tolist()
    prompt = sequence_tokens // PROMPT_SHARE
    trained = [place >= prompt for place in range(sequence_tokens)]
    old = [-10.0] * (sequence_tokens - prompt)
    return [Sample(row, trained, old, old, 1.0 - 2.0 * (number % 2)) for number, row in enumerate(ids)]


def flops_of(shape: ModelConfig, lengths: list[int], num_scored: int) -> float:
    """Forward and backward of a pack: weights of the layers a token, the head a scored token, attention a pair."""
    heads = 2 * shape.num_heads * shape.head_dim + 2 * shape.num_kv_heads * shape.head_dim
    weights = shape.num_layers * shape.hidden_size * (heads + 3 * shape.intermediate_size)
    pairs = sum(length**2 for length in lengths) / 2  # causal
    attention = 12 * pairs * shape.num_layers * shape.num_heads * shape.head_dim
    return 6 * weights * sum(lengths) + 6 * shape.vocab_size * shape.hidden_size * num_scored + attention


def train_once(model: Decoder, samples: list[Sample], pack: Pack) -> None:
    """Forward, Eq. 8 and backward, as train_rl.py does it."""
    tokens = loss_tokens(samples, pack)
    logprobs, _ = score(model, pack)
    hierarchical_loss(logprobs, tokens, count_tokens(tokens), LossOptions()).backward()


def speed(model: Decoder, samples: list[Sample], device: torch.device) -> dict[str, float]:
    """FLOP a second of some steps after one that does not count, and the peak of memory."""
    pack = make_pack(samples, device)
    reset_peak(device)
    train_once(model, samples, pack)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        train_once(model, samples, pack)
    synchronize(device)
    seconds = (time.perf_counter() - started) / TIMED_STEPS
    return {"tokens": len(pack.token_ids), "step_seconds": seconds, "peak_bytes": peak_memory(device),
            "flops_per_second": flops_of(model.config, pack.lengths, len(pack.rows)) / seconds}


def largest(model: Decoder, sizes: list[int], sequence_tokens: int, device: torch.device) -> list[dict[str, float]]:
    """`speed` for growing packs, up to the first that does not fit."""
    found = []
    for size in sizes:
        try:
            found.append(speed(model, some_samples(model.config, size, sequence_tokens), device))
        except torch.OutOfMemoryError:
            break
    return found


def measure(shape: ModelConfig, dtype: torch.dtype, device: torch.device, sizes: list[int], checkpointed_tokens: int,
            sequence_tokens: int) -> dict[str, object]:
    """Packs without recomputation as large as fit, one with checkpointing by layer, and the memory of logits."""
    model = build_model(shape, dtype, device)
    samples = some_samples(shape, checkpointed_tokens, sequence_tokens)
    found = {"weight_bytes": layer_bytes(shape, dtype)}
    model.checkpoint_layers = True
    found["checkpointed"] = speed(model, samples, device)
    report(found)
    found["memory"] = memory(model, some_samples(shape, checkpointed_tokens // 2, sequence_tokens), device)
    report(found)
    model.checkpoint_layers = False
    found["plain"] = largest(model, sizes, sequence_tokens, device)
    report(found)
    model.checkpoint_layers, pack = True, make_pack(samples, device)
    return {**found, "profile": top_kernels(device, lambda: train_once(model, samples, pack))}


def measure_compiled(shape: ModelConfig, dtype: torch.dtype, device: torch.device, tokens: int,
                     sequence_tokens: int) -> dict[str, object]:
    """The checkpointed pack once more with norms and feed-forward compiled."""
    model = build_model(shape, dtype, device)
    model.checkpoint_layers = True
    compile_layers(model)
    return {"compiled": speed(model, some_samples(shape, tokens, sequence_tokens), device)}


def memory(model: Decoder, samples: list[Sample], device: torch.device) -> dict[str, float]:
    """Peak bytes above weights and gradients, with log-probs chunk by chunk and with full logits."""
    pack, found = make_pack(samples, device), {}
    for name, scored in (("chunked", lambda: score(model, pack)[0]), ("full", lambda: full_logprobs(model, pack))):
        scored().sum().backward()  # gradients are there from here on
        reset_peak(device)
        before = peak_memory(device)
        scored().sum().backward()
        found[name] = peak_memory(device) - before
    return {**found, "tokens": len(pack.token_ids)}


def full_logprobs(model: Decoder, pack: Pack) -> Tensor:
    """What `score` gives, with all logits at once."""
    hidden = model(pack.token_ids, pack.positions, packed(pack.lengths))[pack.rows]
    return model.logits(hidden).log_softmax(-1).gather(-1, pack.targets[:, None])[:, 0]


def top_kernels(device: torch.device, action: Callable[[], object]) -> list[str]:
    """What takes most of an action's time on the device, with shares; empty where the profiler does not run."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            action()
            synchronize(device)
        times = kernel_times(profiler.key_averages(), on_gpu)
    except (RuntimeError, AttributeError):
        return []
    total = sum(times.values()) or 1.0
    order = sorted(times, key=lambda name: -times[name])[:TOP_KERNELS]
    return [f"{name[:60]} {times[name] / total:.0%}" for name in order]


def kernel_times(events: Iterable[FunctionEventAvg], on_gpu: bool) -> dict[str, float]:
    """Microseconds by name; on a GPU of kernels alone, whose time the operators that launched them count once more."""
    if not on_gpu:
        return {event.key: event.self_cpu_time_total for event in events}
    return {event.key: event.self_device_time_total for event in events
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation}


if __name__ == "__main__":
    print("these are rows of gpu.py: python benchmarks/gpu.py --rows training")
