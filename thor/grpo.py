"""The loss of hierarchical RL, equation by equation (paper Eq. 3 to 8), as pure functions of tensors.

Nothing here knows models, batches or devices. Tensors hold trained tokens only (m = 1: think and act, the end-of-turn
token included), so no mask appears below. Invariant: every loss is a sum divided once by a count over the whole
optimizer step, all ranks and micro-batches; a micro-batch therefore adds its share, whatever its size or order.

N trajectories · T trained tokens
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

STD_EPSILON = 1e-6


@dataclass(frozen=True)
class LossOptions:
    """Weights and switches. The defaults are the paper's; what is off by default is for ablations."""

    clip_low: float = 0.2  # ε_low and ε_high of Eq. 5, distances from 1
    clip_high: float = 0.28
    dual_clip: float | None = 3.0  # c of Eq. 5; None is off
    nll_weight: float = 0.01  # α of Eq. 7
    step_weight: float = 1.0  # λ of Eq. 8
    joint: bool = False  # the released code: one normaliser over trajectories and branches together, λ unused
    sequence_ratio: bool = False  # GSPO: ρ is the geometric mean over a sequence
    importance_cap: float | None = None  # truncated importance weight for the gap between sampler and trainer
    kl_weight: float = 0.0  # k3 estimate of KL(π_θ ‖ π_ref)
    entropy_weight: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of each trained token beside its log-prob under π_θ; all [T]."""

    old_logprobs: Tensor  # log π_old, by the trainer, at the sampling temperature
    sampler_logprobs: Tensor  # the same by the sampler, as it drew the token
    advantages: Tensor  # Â of the token's sequence
    is_step: Tensor  # bool: the token belongs to a branch of the step level
    sequence: Tensor  # int64: which sequence of this micro-batch, from 0


@dataclass(frozen=True)
class Counts:
    """Denominators over the whole optimizer step, all ranks and micro-batches: Σ|τ_i| of Eq. 5 and of Eq. 6."""

    trajectory_tokens: int = 0
    trajectory_positive: int = 0
    step_tokens: int = 0
    step_positive: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Counts)))


def count_tokens(tokens: Tokens) -> Counts:
    """The share of one micro-batch in the denominators; add them up before the first loss."""
    positive = tokens.advantages > 0
    step = tokens.is_step
    return Counts(*(int(chosen.sum()) for chosen in (~step, ~step & positive, step, step & positive)))


def group_advantages(rewards_N: Tensor, group_ids_N: Tensor, normalize_std: bool = True) -> Tensor:
    """Eq. 3: Â_i = (R_i − mean(R)) / (std(R) + ε) within each group, std with Bessel's correction, ε = 1e-6.

    Groups are told apart by their integer ids, in any order. A group with one member or with equal rewards gets 0.
    `normalize_std=False` leaves the division out (Dr. GRPO). Example: rewards 1, 0, 0 in one group give 1.155, −0.577,
    −0.577. ValueError for a reward that is not finite.
    """
    if len(rewards_N) != len(group_ids_N) or not rewards_N.isfinite().all():
        raise ValueError(f"every reward must be a finite number with a group id, got {rewards_N} and {group_ids_N}")
    rewards = rewards_N.double()
    _, group_N = torch.unique(group_ids_N, return_inverse=True)
    size = torch.bincount(group_N).double()
    mean = _group_sum(rewards, group_N, len(size)) / size
    centred = rewards - mean[group_N]
    variance = _group_sum(centred.square(), group_N, len(size)) / (size - 1).clamp(min=1)
    scale = variance.sqrt() + STD_EPSILON if normalize_std else torch.ones_like(variance)
    low, high = (torch.full_like(mean, fill).scatter_reduce(0, group_N, rewards, how)
                 for fill, how in ((torch.inf, "amin"), (-torch.inf, "amax")))
    advantages = torch.where((high > low)[group_N], centred / scale[group_N], 0.0)
    return advantages.to(rewards_N.dtype if rewards_N.is_floating_point() else torch.float32)


def _group_sum(values_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    return values_N.new_zeros(num_groups).scatter_add(0, group_N, values_N)


def clipped_surrogate(logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, clip_low: float,
                      clip_high: float, dual_clip: float | None) -> Tensor:
    """Eq. 4 and 5: −s per token, with s = min(ρ Â, clip(ρ, 1−ε_low, 1+ε_high) Â), and s ← max(s, c Â) where Â < 0."""
    ratio = safe_exp(logprobs_T - old_logprobs_T)
    s = torch.minimum(ratio * advantages_T, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages_T)
    if dual_clip is not None:
        s = torch.where(advantages_T < 0, torch.maximum(s, dual_clip * advantages_T), s)
    return -s


def safe_exp(log_ratio_T: Tensor) -> Tensor:
    """exp, stopped at the square root of the largest number: where the clip is flat, 0 · inf would give NaN."""
    return log_ratio_T.clamp(max=math.log(torch.finfo(log_ratio_T.dtype).max) / 2).exp()


def token_surrogates(logprobs_T: Tensor, tokens: Tokens, options: LossOptions) -> Tensor:
    """−s of each token with the options' variants of ρ and of the sampler's weight."""
    log_ratio = log_ratios(logprobs_T, tokens, options)
    losses = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), tokens.advantages, options.clip_low,
                               options.clip_high, options.dual_clip)
    if options.importance_cap is not None:
        losses = losses * (tokens.old_logprobs - tokens.sampler_logprobs).exp().clamp(max=options.importance_cap)
    return losses


def log_ratios(logprobs_T: Tensor, tokens: Tokens, options: LossOptions) -> Tensor:
    """log ρ of Eq. 4; with `sequence_ratio` its mean over the token's sequence."""
    log_ratio = logprobs_T - tokens.old_logprobs
    return sequence_mean(log_ratio, tokens.sequence) if options.sequence_ratio else log_ratio


def sequence_mean(values_T: Tensor, sequence_T: Tensor) -> Tensor:
    """Each token's sequence's mean."""
    size = torch.bincount(sequence_T)
    return (_group_sum(values_T, sequence_T, len(size)) / size)[sequence_T]


def share(values_T: Tensor, chosen_T: Tensor, count: int) -> Tensor:
    """This micro-batch's share of a mean over `count` tokens: Σ chosen values / count; an empty set gives 0."""
    return torch.where(chosen_T, values_T, 0.0).sum() / max(count, 1)


def loss_parts(logprobs_T: Tensor, tokens: Tokens, counts: Counts, options: LossOptions,
               reference_logprobs_T: Tensor | None = None, entropies_T: Tensor | None = None) -> dict[str, Tensor]:
    """Eq. 5 and 6 of each level before any weight, this micro-batch's share: `trajectory_grpo`, `trajectory_nll`, the
    same of `step`, or, with `joint`, once over their union. `kl` and `entropy`, where given, are means over both.
    """
    surrogates, positive, step = token_surrogates(logprobs_T, tokens, options), tokens.advantages > 0, tokens.is_step
    num_tokens, every = counts.trajectory_tokens + counts.step_tokens, torch.ones_like(step)
    levels = {"trajectory": (~step, counts.trajectory_tokens, counts.trajectory_positive),
              "step": (step, counts.step_tokens, counts.step_positive)}
    if options.joint:
        levels = {"joint": (every, num_tokens, counts.trajectory_positive + counts.step_positive)}
    parts = {}
    for level, (chosen, num_chosen, num_positive) in levels.items():
        parts[f"{level}_grpo"] = share(surrogates, chosen, num_chosen)  # Eq. 5
        parts[f"{level}_nll"] = -share(logprobs_T, chosen & positive, num_positive)  # Eq. 6
    if reference_logprobs_T is not None:
        parts["kl"] = share(k3(logprobs_T, reference_logprobs_T), every, num_tokens)
    if entropies_T is not None:
        parts["entropy"] = share(entropies_T, every, num_tokens)
    return parts


def level_loss(parts: dict[str, Tensor], level: str, nll_weight: float) -> Tensor:
    """Eq. 7: L_GRPO + α L_NLL of one level."""
    return parts[f"{level}_grpo"] + nll_weight * parts[f"{level}_nll"]


def hierarchical_loss(logprobs_T: Tensor, tokens: Tokens, counts: Counts, options: LossOptions,
                      reference_logprobs_T: Tensor | None = None, entropies_T: Tensor | None = None) -> Tensor:
    """Eq. 8: L = L_traj + λ L_step, this micro-batch's share. With `joint`, Eq. 7 once over the union instead."""
    parts = loss_parts(logprobs_T, tokens, counts, options, reference_logprobs_T, entropies_T)
    if options.joint:
        loss = level_loss(parts, "joint", options.nll_weight)
    else:
        trajectory, step = (level_loss(parts, level, options.nll_weight) for level in ("trajectory", "step"))
        loss = trajectory + options.step_weight * step
    if "kl" in parts:
        loss = loss + options.kl_weight * parts["kl"]
    if "entropy" in parts:
        loss = loss - options.entropy_weight * parts["entropy"]
    return loss


def k3(logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """Per-token estimate of KL(π_θ ‖ π_ref) that is never negative: r − 1 − log r with r = π_ref / π_θ."""
    log_ratio = reference_logprobs_T - logprobs_T
    return log_ratio.exp() - 1 - log_ratio


def loss_statistics(logprobs_T: Tensor, tokens: Tokens, options: LossOptions) -> dict[str, float]:
    """Sums over this micro-batch's tokens, to be added up and divided by `tokens`: clipping, KL to π_old, sampler gap.

    `sampler_gap_max` alone is no sum: of several micro-batches the largest counts. A token counts as clipped where the
    clip changes its term: ρ above 1 + ε_high with Â > 0, below 1 − ε_low with Â < 0.
    """
    clipped_ratio = safe_exp(log_ratios(logprobs_T.detach(), tokens, options))
    high = (clipped_ratio > 1 + options.clip_high) & (tokens.advantages > 0)
    low = (clipped_ratio < 1 - options.clip_low) & (tokens.advantages < 0)
    ratio = safe_exp(logprobs_T.detach() - tokens.old_logprobs)
    gap = (tokens.old_logprobs - tokens.sampler_logprobs).abs()
    return {"tokens": len(ratio), "clipped_high": high.sum().item(), "clipped_low": low.sum().item(),
            "kl_old": k3(tokens.old_logprobs, logprobs_T.detach()).sum().item(), "ratio": ratio.sum().item(),
            "sampler_gap": gap.sum().item(), "sampler_gap_max": gap.max().item() if len(gap) else 0.0,
            "logprob": logprobs_T.detach().sum().item()}
