"""Models with random weights in the shapes that gpu.py measures, and what it asks of a device."""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor.model import Decoder, ModelConfig  # noqa: E402

QWEN_1_5B = ModelConfig(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
                        num_kv_heads=2, head_dim=128, norm_eps=1e-6, rope_theta=1e6, max_context=32768, qkv_bias=True,
                        tied_head=True)
QWEN_7B = ModelConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28,
                      num_kv_heads=4, head_dim=128, norm_eps=1e-6, rope_theta=1e6, max_context=32768, qkv_bias=True)
TINY = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
                   head_dim=16, norm_eps=1e-6, rope_theta=1e4, max_context=32768, qkv_bias=True, tied_head=True)
INIT_STD = 0.02


def build_model(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder whose matrices are random, norms 1 and biases 0, made where it will lie."""
    with torch.device("meta"):
        model = Decoder(shape).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def layer_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Weights that one decoding step reads: all but an untied embedding, of which it reads a few rows."""
    with torch.device("meta"):
        model = Decoder(shape)
    embedding = 0 if shape.tied_head else shape.vocab_size * shape.hidden_size
    return (sum(parameter.numel() for parameter in model.parameters()) - embedding) * dtype.itemsize


def seconds_of(device: torch.device, action: Callable[[], object], repeats: int) -> float:
    """Mean time of an action on the device, after three that do not count."""
    for _ in range(3):
        action()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def key_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize


def some_ids(rng: random.Random, shape: ModelConfig, length: int) -> list[int]:
    """Random tokens."""
    return [rng.randrange(shape.vocab_size) for _ in range(length)]


def synchronize(device: torch.device) -> None:
    """Wait for all the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(numbers: dict[str, object]) -> None:
    """Print what is known so far: of a row's lines, the last one counts."""
    print(json.dumps(numbers), flush=True)


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    """Bytes allocated at most since `reset_peak`; 0 on a CPU, where nobody counts them."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


if __name__ == "__main__":
    for shape in (QWEN_1_5B, QWEN_7B):
        print(shape, layer_bytes(shape, torch.bfloat16))
