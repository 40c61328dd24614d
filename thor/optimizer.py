"""The optimizer step of both training scripts: AdamW, its schedule, clipping, and what becomes of a NaN.

A step whose loss or gradient is not finite changes neither weights nor moments; it is counted, and too many in a row
mean that the run has broken down.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("constant", "cosine")
MAX_SKIPPED_IN_A_ROW = 3


@dataclass
class Skips:
    """Optimizer steps that were left out because something was not finite."""

    total: int = 0
    in_a_row: int = 0

    @property
    def too_many(self) -> bool:
        """Whether the run should stop."""
        return self.in_a_row >= MAX_SKIPPED_IN_A_ROW


def check_arithmetic(device: str, dtype: str, compile_layers: bool, offload: bool) -> None:
    """ValueError for a dtype that is none, and for what only makes sense on CUDA."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
    if (compile_layers or offload) and not device.startswith("cuda"):
        raise ValueError(f"compile and offload are for --device cuda, and device is {device!r}")
    if offload and dtype != "bfloat16":
        raise ValueError(f"offload needs --dtype bfloat16, and dtype is {dtype!r}")


def make_optimizer(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters; only matrices decay, norms and biases do not. One fused kernel on CUDA."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=next(model.parameters()).is_cuda or None)


def learning_rate(step: int, num_steps: int, peak: float, warmup: float, schedule: str) -> float:
    """The rate of step 1, 2, …, `num_steps`: up to `peak` over the share `warmup` of them, then as `schedule` says.

    Example: with 10 steps, peak 1 and warm-up 0.2 the first steps have 0.5, 1, 1 (constant); cosine ends near 0.
    """
    warmup_steps = math.ceil(warmup * num_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / (num_steps - warmup_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, lr: float, max_grad_norm: float,
              skips: Skips) -> float:
    """Apply the accumulated gradients, their global norm clipped, and clear them; returns the norm before clipping.

    `loss` is the whole step's. If it or the norm is not finite, nothing is applied and `skips` is counted up.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    if math.isfinite(norm) and math.isfinite(loss):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        skips.in_a_row = 0
    else:
        skips.total += 1
        skips.in_a_row += 1
    optimizer.zero_grad()
    return norm
