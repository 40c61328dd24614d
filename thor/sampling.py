"""From logits to one token: temperature, then top-k, then top-p, then the inverse CDF of one uniform number.

The noise of a token is a function of (key, position) alone, so a token does not depend on who else is sampled, and
every retry or fork gets fresh noise by getting a new key. The log-prob returned is that of the distribution the token
was drawn from; greedy decoding draws from a point mass, and there it is that of the plain softmax at temperature 1.

B rows · V vocabulary
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Top-p needs the vocabulary in descending order; this many tokens nearly always hold the mass, so a full sort is rare.
TOP_P_SHORTLIST = 1024
DRAW_BLOCK = 128  # tokens whose probabilities `draw` adds up first; divides the usual vocabularies


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def noise_key(*parts: int | str) -> bytes:
    """A stable 16-byte key from run seed, problem id, sample, step, attempt, … in the caller's order."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def uniform(key: bytes, position: int) -> float:
    """The uniform number in [0, 1) that decides the token at `position` of the sequence that owns `key`."""
    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53  # the 53 bits a float64 holds exactly


def sample_tokens(logits_BV: Tensor, uniforms_B: list[float], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF: (token ids [B], their log-probs [B], float32)."""
    if sampling.temperature == 0:
        tokens = logits_BV.argmax(-1)
        return tokens, logits_BV.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    logprobs = filtered_logprobs(logits_BV, sampling)
    # float64 from here on: a float32 running sum picks another token in 1 of 1,000 draws
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    noise = torch.tensor(uniforms_B, dtype=torch.float64, device=cdf.device)[:, None]
    tokens = torch.searchsorted(cdf, noise * cdf[:, -1:], right=True)
    tokens = tokens.minimum(_last_true(logprobs.exp() > 0))[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperatures_B: Tensor) -> tuple[Tensor, Tensor]:
    """`sample_tokens` without top-k and top-p, each row at its own temperature, in tensors of fixed size: for a GPU.

    The running sum is taken over blocks first, then within the block that holds the token: a plain one over a long row
    is slow there. Both in float64, so that the token is the same but for about one draw in 10^12.
    """
    greedy = temperatures_B == 0
    scaled = logits_BV / temperatures_B.masked_fill(greedy, 1.0).to(logits_BV.dtype)[:, None]
    highest = scaled.amax(-1, keepdim=True)
    weights, vocab_size = (scaled - highest).exp(), scaled.shape[1]
    if vocab_size % DRAW_BLOCK:
        weights = F.pad(weights, (0, -vocab_size % DRAW_BLOCK))
    weights = weights.unflatten(-1, (-1, DRAW_BLOCK))  # [B, blocks, DRAW_BLOCK]
    sums = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, blocks]
    target = uniforms_B[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)
    before = sums.gather(-1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    inside = weights.gather(1, block[..., None].expand(-1, -1, DRAW_BLOCK))[:, 0]  # [B, DRAW_BLOCK]
    place = torch.searchsorted(inside.cumsum(-1, dtype=torch.float64), target - before, right=True)
    place = place.minimum(_last_true(inside > 0))
    drawn = (block * DRAW_BLOCK + place)[:, 0].clamp(max=vocab_size - 1)  # of NaN, too, a token that there is
    tokens = torch.where(greedy, logits_BV.argmax(-1), drawn)
    return tokens, (scaled.gather(-1, tokens[:, None]) - highest)[:, 0] - sums[:, -1].log().to(scaled.dtype)


def filtered_logprobs(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs [B, V] after temperature, top-k and top-p, renormalised; −inf where a token cannot be drawn.

    Tokens as likely as the last one kept are kept too, so the result does not depend on how a sort breaks ties.
    """
    scaled = logits_BV / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        kth = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    logprobs = scaled.log_softmax(-1)
    if sampling.top_p < 1:
        probs = logprobs.exp()
        keep = probs >= _nucleus_floor(probs, sampling.top_p)
        logprobs = logprobs.masked_fill(~keep, -torch.inf).log_softmax(-1)
    return logprobs


def _nucleus_floor(probs_BV: Tensor, top_p: float) -> Tensor:
    """[B, 1]: probability of the last token in the smallest set, most likely first, whose mass reaches top_p."""
    size = min(TOP_P_SHORTLIST, probs_BV.shape[-1])
    shortlist = probs_BV.topk(size, dim=-1).values
    if (shortlist.sum(-1, dtype=torch.float64) < top_p).any():
        shortlist = probs_BV.sort(dim=-1, descending=True).values
    mass_before = shortlist.cumsum(-1, dtype=torch.float64) - shortlist
    last = (mass_before < top_p).sum(-1, keepdim=True) - 1
    return shortlist.gather(-1, last)


def _last_true(possible_BV: Tensor) -> Tensor:
    """[B, 1]: the last token that can be drawn, where rounding at the end of the CDF must land."""
    return possible_BV.shape[-1] - 1 - possible_BV.flip(-1).int().argmax(-1, keepdim=True)
