"""Trajectories and branches as packed token streams: nothing padded, masks from spans, log-probs chunk by chunk.

The hidden state at position t − 1 scores the token at t, so a pack names for every trained token the row that scores
it; prompt and observation tokens are read and never scored. Invariants: a sequence lies whole in one pack; every rank
gets the same number of packs; the full [T, V] logits never exist, forward or backward.

T packed tokens · S scored (trained) tokens · V vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thor.attention import packed
from thor.grpo import Tokens
from thor.model import Decoder
from thor.trajectory import ACT, Trajectory, loss_mask

CHUNK_TOKENS = 256  # scored tokens whose logits exist at a time


@dataclass(frozen=True)
class Sample:
    """One sequence to train on. `trained` marks tokens of `ids`; the two log-prob lists have one entry each of those.

    `old_logprobs` is None until the trainer has scored the sequence with π_old; SFT needs neither.
    """

    ids: list[int]
    trained: list[bool]
    sampler_logprobs: list[float]
    old_logprobs: list[float] | None = None
    advantage: float = 0.0
    is_step: bool = False

    @property
    def num_trained(self) -> int:
        """|τ_i| of Eq. 5: tokens with m = 1."""
        return sum(self.trained)


@dataclass(frozen=True)
class Pack:
    """Sequences one after another. `rows` [S] are the hidden states that score `targets` [S], `sequence` by sequence."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    lengths: list[int]
    rows: Tensor
    targets: Tensor
    sequence: Tensor


def trajectory_sample(trajectory: Trajectory, advantage: float = 0.0) -> Sample:
    """A whole trajectory: think and act are trained, prompt and observations are context."""
    mask = loss_mask(trajectory.spans, len(trajectory.response_ids))
    logprobs = trajectory.logprobs or [0.0] * len(mask)
    return Sample(trajectory.prompt_ids + trajectory.response_ids, [False] * len(trajectory.prompt_ids) + mask,
                  [p for p, trained in zip(logprobs, mask, strict=True) if trained], advantage=advantage)


def branch_sample(branch: Trajectory, advantage: float, code_only: bool = False) -> Sample:
    """A branch of the step level, whose prompt is h^t + r_pre: r_suf and a are trained, with `code_only` a alone."""
    sample = trajectory_sample(branch, advantage)
    trained, logprobs = sample.trained, sample.sampler_logprobs
    if code_only:
        code = [span.kind == ACT for span in branch.spans for _ in range(span.start, span.end)]
        trained = [False] * len(branch.prompt_ids) + code
        logprobs = [p for p, kept in zip(branch.logprobs, code, strict=True) if kept]
    return Sample(sample.ids, trained, logprobs, advantage=advantage, is_step=True)


def deal_packs(lengths: list[int], token_budget: int, num_ranks: int = 1) -> list[list[list[int]]]:
    """Which sequences go into which pack of which rank: `packs[rank][i]` are indices into `lengths`.

    Longest first into the emptiest pack, with as few packs as keep each within the budget; every rank gets the same
    number, if need be empty ones. A sequence longer than the budget gets a pack of its own.
    Example: lengths 5, 4, 3, 3, 2 with budget 9 on one rank give two packs, of 8 and 9 tokens.
    """
    if token_budget < 1 or num_ranks < 1:
        raise ValueError(f"packs need a positive budget and rank count, got {token_budget} tokens, {num_ranks} ranks")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    largest_allowed = max([token_budget, *lengths])
    rounds = max(1, -(-sum(lengths) // (largest_allowed * num_ranks)))
    while True:
        bins = _fill(order, lengths, rounds * num_ranks)
        if all(len(members) <= 1 or sum(lengths[i] for i in members) <= token_budget for members in bins):
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        rounds += 1


def _fill(order: list[int], lengths: list[int], num_bins: int) -> list[list[int]]:
    """Each in turn into the bin with the fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    for index in order:
        emptiest = tokens.index(min(tokens))
        bins[emptiest].append(index)
        tokens[emptiest] += lengths[index]
    return bins


def make_pack(samples: list[Sample], device: torch.device | str = "cpu") -> Pack:
    """Lay some sequences out one after another. A sequence's first token has nothing before it and is never trained.

    No sequence at all gives one token that is read and not scored, so that a rank without work runs the same forward.
    """
    samples = samples or [Sample([0], [False], [])]
    ids, positions, rows, targets, sequence = [], [], [], [], []
    for number, sample in enumerate(samples):
        assert not sample.trained[0], "the first token of a sequence cannot be scored"
        start = len(ids)
        trained = [place for place, flag in enumerate(sample.trained) if flag]
        ids += sample.ids
        positions += range(len(sample.ids))
        rows += [start + place - 1 for place in trained]
        targets += [sample.ids[place] for place in trained]
        sequence += [number] * len(trained)
    tensors = [torch.tensor(values, dtype=torch.int64, device=device)
               for values in (ids, positions, rows, targets, sequence)]
    return Pack(tensors[0], tensors[1], [len(sample.ids) for sample in samples], *tensors[2:])


def loss_tokens(samples: list[Sample], pack: Pack, dtype: torch.dtype = torch.float32) -> Tokens:
    """What the loss knows of the pack's scored tokens."""
    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=pack.rows.device)

    counts = torch.tensor([sample.num_trained for sample in samples], dtype=torch.int64, device=pack.rows.device)
    is_step = torch.tensor([sample.is_step for sample in samples], dtype=torch.bool, device=pack.rows.device)
    assert all(sample.old_logprobs is not None for sample in samples), "score the samples with π_old first"
    return Tokens(
        old_logprobs=per_token([p for sample in samples for p in sample.old_logprobs]),
        sampler_logprobs=per_token([p for sample in samples for p in sample.sampler_logprobs]),
        advantages=per_token([sample.advantage for sample in samples]).repeat_interleave(counts),
        is_step=is_step.repeat_interleave(counts),
        sequence=pack.sequence)


def score(model: Decoder, pack: Pack, temperature: float = 1.0, with_entropy: bool = False,
          chunk_tokens: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor | None]:
    """Log-probs [S] of the pack's trained tokens at the sampling temperature, and, if asked for, entropies [S].

    Only scored rows go through the head, `chunk_tokens` at a time; the backward pass computes a chunk's logits again.
    """
    hidden = model(pack.token_ids, pack.positions, packed(pack.lengths))[pack.rows]
    parts = [checkpoint(_score_chunk, model, rows, targets, temperature, with_entropy, use_reentrant=False)
             for rows, targets in zip(hidden.split(chunk_tokens), pack.targets.split(chunk_tokens), strict=True)]
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None


def _score_chunk(model: Decoder, hidden_SE: Tensor, targets_S: Tensor, temperature: float,
                 with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    logprobs_SV = (model.logits(hidden_SE) / temperature).log_softmax(-1)
    chosen = logprobs_SV.gather(-1, targets_S[:, None])[:, 0]
    return chosen, -(logprobs_SV.exp() * logprobs_SV).sum(-1) if with_entropy else None
