"""Who attends to whom: packed sequences in training, a KV cache in sampling. Each fast path has a slow twin.

The slow twins (`packed`, `cached_slow`) are the definition: one sequence at a time through torch's own attention.
`feed` is one step of the sampler. With `exact` it gives a token the same bits whatever else is in the step, which CPU
libraries do not do for other shapes: rows in multiples of 8, and attention as matmul, softmax, matmul with the query
rows of a key/value head in multiples of 4, the keys in multiples of 64 and the sum over values in blocks of 128.

T packed tokens · H query heads · K key/value heads · G query heads per key/value head · D head dim · P key positions
"""

import functools
import inspect
import itertools
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thor.cache import KEY_BLOCK, KVCache, round_up
from thor.model import Attend, Decoder

# MKL's strict mode: a row of a product has the same bits whatever the number of rows, at no cost in speed. It is read
# at the process's first product, so it must be set before that; where it came too late, the engine's self-test says so.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

ROW_BLOCK = 8
QUERY_BLOCK = 4
# A product splits a longer sum into parts whose sizes depend on its length, and that is the longest mate's.
VALUE_BLOCK = 128
# Single tokens this many slots apart still share a product: to compute and forget a few slots costs less than one more.
MAX_GAP = 8


@dataclass(frozen=True)
class Row:
    """`count` new tokens of the sequence in `slot`, whose first one stands at position `start`."""

    slot: int
    start: int
    count: int


def packed(lengths: list[int]) -> Attend:
    """Causal attention within each of the sequences that lie one after another in the stream.

    On CUDA in half precision one kernel reads the whole stream; everywhere else its slow twin takes one sequence at a time.
    """
    bounds_on = functools.cache(torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32).to)

    def attend(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if q_THD.is_cuda and q_THD.dtype in (torch.bfloat16, torch.float16):
            return _causal_stream(q_THD, k_TKD, v_TKD, bounds_on(q_THD.device), max(lengths))
        parts = zip(q_THD.split(lengths), k_TKD.split(lengths), v_TKD.split(lengths), strict=True)
        return torch.cat([_causal(q, k, v) for q, k, v in parts])

    return attend


def _causal_stream(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """torch's kernel for sequences of unequal length; `bounds` [N + 1] int32 are where they begin, and the end.

    Its arguments for causal masks and for fewer key/value heads came one after the other (torch 2.11 has no enable_gqa).
    """
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import, and no CPU can use it

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        return varlen_attn(q_THD, k_TKD, v_TKD, bounds, bounds, longest, longest, enable_gqa=True, **causal)
    k, v = (x.repeat_interleave(q_THD.shape[1] // x.shape[1], dim=1) for x in (k_TKD, v_TKD))
    return varlen_attn(q_THD, k, v, bounds, bounds, longest, longest, **causal)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention of one sequence: q [n, H, D], k and v [n, K, D] -> [n, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def cached_slow(cache: KVCache, rows: list[Row]) -> Attend:
    """Slow twin of `cached`: store the new keys and values, then one row at a time through torch's attention."""

    def attend(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        out, token = torch.zeros_like(q_THD), 0
        for row in rows:
            tokens, end = slice(token, token + row.count), row.start + row.count
            positions = torch.arange(row.start, end, device=q_THD.device)
            cache.write(layer, torch.full_like(positions, row.slot), positions, k_TKD[tokens], v_TKD[tokens])
            heads = slice(row.slot * cache.num_kv_heads, (row.slot + 1) * cache.num_kv_heads)
            visible = torch.arange(end, device=q_THD.device)[None, :] <= positions[:, None]
            out[tokens] = F.scaled_dot_product_attention(
                q_THD[tokens].transpose(0, 1)[None], cache.keys[layer, heads, :end][None],
                cache.values[layer, heads, :end][None], attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)
            token += row.count
        return out

    return attend


@dataclass(frozen=True)
class _Piece:
    """Rows that one product computes: single tokens of `num_slots` slots in a line, or all new tokens of one slot.

    `places` says which of the slots have a row here; the others are computed like them and forgotten.
    """

    tokens: Tensor  # [rows], where in the stream
    places: Tensor | None  # [rows], None if every slot of the piece has its row
    heads: slice
    num_slots: int
    count: int
    num_keys: int
    bias: Tensor  # [1 or num_slots * K, 1 or query rows, P]: 0 where visible, -inf where not


def cached(cache: KVCache, rows: list[Row], num_heads: int) -> Attend:
    """Attention over a cache for one step; the stream is `rows` in order of slot, then padding up to any length.

    Single tokens in slots near one another share one product over a view of the cache; a row with several new tokens (a
    prompt, an observation) is a product of its own. Padding tokens get zeros.
    """
    device = cache.keys.device
    slots = torch.tensor([row.slot for row in rows for _ in range(row.count)], device=device)
    positions = torch.tensor([row.start + i for row in rows for i in range(row.count)], device=device)
    group = num_heads // cache.num_kv_heads
    pieces = [_piece(cache, run, tokens, group) for run, tokens in _runs(rows)]

    def attend(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        cache.write(layer, slots, positions, k_TKD[: len(slots)], v_TKD[: len(slots)])
        q_THD = q_THD * q_THD.shape[-1] ** -0.5
        out = torch.zeros_like(q_THD)
        for piece in pieces:
            keys = cache.keys[layer, piece.heads, : piece.num_keys]
            values = cache.values[layer, piece.heads, : piece.num_keys]
            out[piece.tokens] = _mix(q_THD[piece.tokens], keys, values, piece, group)
        return out

    return attend


def _runs(rows: list[Row]) -> list[tuple[list[Row], list[int]]]:
    """Rows cut into runs, each with its tokens' places in the stream: single tokens whose slots are at most MAX_GAP
    apart run together, whatever lies between; a row with several tokens is a run of its own."""
    runs: list[tuple[list[Row], list[int]]] = []
    singles: tuple[list[Row], list[int]] = ([], [])
    token = 0
    for row in rows:
        tokens = list(range(token, token + row.count))
        token += row.count
        if row.count > 1:
            runs.append(([row], tokens))
            continue
        if not singles[0] or row.slot - singles[0][-1].slot > MAX_GAP:
            runs.append(singles := ([], []))
        singles[0].append(row)
        singles[1].extend(tokens)
    return runs


def _piece(cache: KVCache, run: list[Row], tokens: list[int], group: int) -> _Piece:
    first, count, heads = run[0].slot, run[0].count, cache.num_kv_heads
    num_slots = run[-1].slot - first + 1
    num_keys = round_up(max(row.start + row.count for row in run), KEY_BLOCK)
    device = cache.keys.device
    places = torch.tensor([row.slot - first for row in run], device=device)
    starts = torch.zeros(num_slots, dtype=torch.int64, device=device)
    starts[places] = torch.tensor([row.start for row in run], device=device)
    # Query rows of a head come token by token, G heads each; a single token's rows all see the same keys.
    offsets = torch.arange(count, device=device).repeat_interleave(group if count > 1 else 1)
    last_seen = starts[:, None] + offsets  # [num_slots, query rows]
    hidden = torch.arange(num_keys, device=device) > last_seen[..., None]
    bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    missing = -(count * group) % QUERY_BLOCK if count > 1 else 0
    bias = F.pad(bias, (0, 0, 0, missing)).to(cache.keys.dtype)
    if num_slots > 1:  # one slot's bias is the same for all its heads and broadcasts
        bias = bias.repeat_interleave(heads, dim=0)  # [num_slots * K, ...], the order of the cache
    slots = slice(first * heads, (first + num_slots) * heads)
    return _Piece(torch.tensor(tokens, device=device), places if len(run) < num_slots else None, slots, num_slots, count,
                  num_keys, bias)


def _mix(q_THD: Tensor, keys: Tensor, values: Tensor, piece: _Piece, group: int) -> Tensor:
    """softmax(q kᵀ) v for one piece. q [rows * count, H, D]; keys and values [num_slots * K, P, D]."""
    num_heads, head_dim = q_THD.shape[1:]
    if piece.places is not None:
        q_THD = q_THD.new_zeros(piece.num_slots, num_heads, head_dim).index_copy_(0, piece.places, q_THD)
    q = q_THD.view(piece.num_slots, piece.count, -1, group, head_dim).transpose(1, 2)  # [slots, K, count, G, D]
    q = q.reshape(keys.shape[0], piece.count * group, head_dim)
    rows = q.shape[1]
    q = F.pad(q, (0, 0, 0, -rows % QUERY_BLOCK))
    scores = torch.baddbmm(piece.bias, q, keys.transpose(1, 2))
    probs = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    mixed = torch.bmm(probs[..., :VALUE_BLOCK], values[:, :VALUE_BLOCK])
    for start in range(VALUE_BLOCK, piece.num_keys, VALUE_BLOCK):
        block = slice(start, start + VALUE_BLOCK)
        mixed = mixed.baddbmm_(probs[..., block], values[:, block])
    mixed = mixed[:, :rows].view(piece.num_slots, -1, piece.count, group, head_dim).transpose(1, 2)
    mixed = mixed.reshape(-1, num_heads, head_dim)
    return mixed if piece.places is None else mixed[piece.places]


def feed(model: Decoder, cache: KVCache, rows: list[Row], ids: list[int], exact: bool) -> Tensor:
    """One forward: `ids` are the new tokens of `rows`, in order of slot. Hidden states [T, E], then padding."""
    padding = [0] * (-len(ids) % ROW_BLOCK if exact else 0)
    positions = [row.start + i for row in rows for i in range(row.count)]
    device = cache.keys.device
    attend = cached(cache, rows, model.config.num_heads)
    return model(torch.tensor(ids + padding, device=device), torch.tensor(positions + padding, device=device), attend)


def head(model: Decoder, hidden_BE: Tensor, exact: bool) -> Tensor:
    """Logits [B, V] of some rows, computed with padding rows where `exact` asks for it."""
    padding = hidden_BE.new_zeros(-len(hidden_BE) % ROW_BLOCK if exact else 0, hidden_BE.shape[1])
    return model.logits(torch.cat((hidden_BE, padding)))[:len(hidden_BE)]
