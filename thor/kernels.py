"""Triton kernels of one decode step. Imported where Triton is; everything here has a twin in plain torch.

A step with one token a sequence reads weights and keys once and computes little, so what costs is the number of kernels
and whether they read only what is needed. `paged_decode` reads only pages in use, each once for all query heads of a
key/value head, split over keys so that a small batch fills the GPU; the others fuse what torch does in many small ones,
rounding where the model rounds. Sums and products are taken in float32.

B rows, one new token each · H query heads · K key/value heads · P tokens of a page · D head dim · E hidden size
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_DOT = 16  # rows of the smallest matrix product that tensor cores do
TARGET_PROGRAMS = 1024  # some eight for each multiprocessor of a large GPU
MAX_SPLITS = 16


@triton.jit
def _attend_part(q_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, mixed_ptr, best_ptr, total_ptr, table_stride,
                 scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
                 BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax-weighted values over one part of a row's pages, for the query heads of one key/value head."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions_ptr + row) + 1
    num_pages = (length + PAGE - 1) // PAGE
    share = (num_pages + SPLITS - 1) // SPLITS
    first = split * share
    last = tl.minimum(first + share, num_pages)
    g, n, d = tl.arange(0, BLOCK_G), tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    heads = row * KV_HEADS * GROUP + kv_head * GROUP + g
    q = tl.load(q_ptr + heads[:, None] * DIM + d[None, :], mask=(g[:, None] < GROUP) & (d[None, :] < DIM), other=0.0)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for place in range(first, last):
        page = tl.load(table_ptr + row * table_stride + place).to(tl.int64)
        inside = (page * KV_HEADS + kv_head) * PAGE * DIM + n[:, None] * DIM + d[None, :]
        k = tl.load(keys_ptr + inside, mask=d[None, :] < DIM, other=0.0)
        v = tl.load(values_ptr + inside, mask=d[None, :] < DIM, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(place * PAGE + n[None, :] < length, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))  # finite: every page of the part has a visible key
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        best = higher
    part = heads * SPLITS + split
    tl.store(best_ptr + part, best, mask=g < GROUP)
    tl.store(total_ptr + part, total, mask=g < GROUP)
    tl.store(mixed_ptr + part[:, None] * DIM + d[None, :], mixed, mask=(g[:, None] < GROUP) & (d[None, :] < DIM))


@triton.jit
def _join_parts(mixed_ptr, best_ptr, total_ptr, out_ptr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                SPLITS: tl.constexpr):
    """The parts of one query head, each weighted by its share of the softmax; an empty part has a maximum of -inf."""
    head = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    best = tl.load(best_ptr + head * SPLITS + s)
    weights = tl.exp(best - tl.max(best, 0))
    total = tl.sum(tl.load(total_ptr + head * SPLITS + s) * weights, 0)
    inside = (head * SPLITS + s)[:, None] * DIM + d[None, :]
    mixed = tl.load(mixed_ptr + inside, mask=d[None, :] < DIM, other=0.0)
    out = tl.sum(mixed * weights[:, None], 0) / total
    tl.store(out_ptr + head * DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < DIM)


def paged_decode(q_BHD: Tensor, keys: Tensor, values: Tensor, table_BN: Tensor, positions_B: Tensor,
                 max_splits: int = MAX_SPLITS) -> Tensor:
    """Attention of one token a row to positions 0 … its own. keys and values [pages, K, P, D], contiguous -> [B, H, D].

    Twin: `paged_attention.attend_pages`. float32 products are exact ones, not TF32. P must be 16 or more.
    """
    batch, num_heads, dim = q_BHD.shape
    kv_heads, page = keys.shape[1:3]
    assert page >= MIN_DOT and keys.is_contiguous() and values.is_contiguous(), "pages of 16 tokens or more, contiguous"
    q = q_BHD.contiguous()
    splits = min(max_splits, triton.next_power_of_2(max(1, TARGET_PROGRAMS // (batch * kv_heads))))
    mixed = torch.empty(batch, num_heads, splits, dim, dtype=torch.float32, device=q.device)
    best, total = torch.empty(2, batch, num_heads, splits, dtype=torch.float32, device=q.device).unbind(0)
    block_dim = triton.next_power_of_2(dim)
    group = num_heads // kv_heads
    _attend_part[(batch, kv_heads, splits)](
        q, keys, values, table_BN, positions_B, mixed, best, total, table_BN.stride(0), dim**-0.5, KV_HEADS=kv_heads,
        GROUP=group, PAGE=page, DIM=dim, BLOCK_G=max(MIN_DOT, triton.next_power_of_2(group)),
        BLOCK_D=max(MIN_DOT, block_dim), SPLITS=splits, PRECISION="ieee" if q.dtype == torch.float32 else "tf32")
    out = torch.empty_like(q)
    _join_parts[(batch * num_heads,)](mixed, best, total, out, DIM=dim, BLOCK_D=block_dim, SPLITS=splits)
    return out


@triton.jit
def _add_norm(x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, eps, SIZE: tl.constexpr, HAS_DELTA: tl.constexpr,
              BLOCK: tl.constexpr):
    """One row of x + delta, and its RMS norm."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * SIZE + i, mask=i < SIZE, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * SIZE + i, mask=i < SIZE, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * SIZE + i, x, mask=i < SIZE)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + i, mask=i < SIZE, other=0.0)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * SIZE + i, normed.to(x.dtype), mask=i < SIZE)


def add_norm(x_BE: Tensor, delta_BE: Tensor | None, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm); with no delta x itself. Rows of any size, contiguous. Twin: `model.RMSNorm`."""
    rows, size = x_BE.shape
    out = torch.empty_like(x_BE)
    total = x_BE if delta_BE is None else torch.empty_like(x_BE)
    _add_norm[(rows,)](x_BE, x_BE if delta_BE is None else delta_BE, weight_E, total, out, eps, SIZE=size,
                       HAS_DELTA=delta_BE is not None, BLOCK=triton.next_power_of_2(size))
    return total, out


@triton.jit
def _rotated(x_ptr, cos, sin, d, DIM: tl.constexpr):
    """One head, turned by its position: dimension i with dimension i + D/2."""
    x = tl.load(x_ptr + d, mask=d < DIM, other=0.0)
    other = tl.load(x_ptr + (d + DIM // 2) % DIM, mask=d < DIM, other=0.0)
    wide, across = x.to(tl.float32) * cos, tl.where(d < DIM // 2, -1.0, 1.0) * other.to(tl.float32) * sin
    return (wide.to(x.dtype).to(tl.float32) + across.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def _rotate_and_store(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, out_ptr,
                      table_stride, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
                      BLOCK_D: tl.constexpr):
    """One head of one row: a query head is rotated, a key head rotated and put in its page, a value head put there."""
    row, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_D)
    cos = tl.load(cos_ptr + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    if head < HEADS:
        query = (row * HEADS + head) * DIM  # its own name: Triton wants one type for what both branches set
        tl.store(out_ptr + query + d, _rotated(q_ptr + query, cos, sin, d, DIM), mask=d < DIM)
    else:
        kv_head = (head - HEADS) % KV_HEADS
        position = tl.load(positions_ptr + row)
        page = tl.load(table_ptr + row * table_stride + position // PAGE).to(tl.int64)
        place = ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * DIM
        source = (row * KV_HEADS + kv_head) * DIM
        if head < HEADS + KV_HEADS:
            tl.store(keys_ptr + place + d, _rotated(k_ptr + source, cos, sin, d, DIM), mask=d < DIM)
        else:
            tl.store(values_ptr + place + d, tl.load(v_ptr + source + d, mask=d < DIM, other=0.0), mask=d < DIM)


def rotate_and_store(q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor, cos_BD: Tensor, sin_BD: Tensor, keys: Tensor,
                     values: Tensor, table_BN: Tensor, positions_B: Tensor) -> Tensor:
    """Rotated queries [B, H, D]; keys (rotated) and values go into pages. Twins: `model.rotate`, `PagedCache.write`."""
    batch, heads, dim = q_BHD.shape
    kv_heads, page = keys.shape[1:3]
    out = torch.empty_like(q_BHD)
    _rotate_and_store[(batch, heads + 2 * kv_heads)](
        q_BHD, k_BKD, v_BKD, cos_BD, sin_BD, keys, values, table_BN, positions_B, out, table_BN.stride(0), HEADS=heads,
        KV_HEADS=kv_heads, PAGE=page, DIM=dim, BLOCK_D=triton.next_power_of_2(dim))
    return out


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < size, other=0.0)
    up = tl.load(up_ptr + i, mask=i < size, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + i, (silu * up.to(tl.float32)).to(gate.dtype), mask=i < size)


def swiglu(gate_BF: Tensor, up_BF: Tensor) -> Tensor:
    """silu(gate) * up, element by element; both contiguous. Twin: `model.silu`."""
    out = torch.empty_like(gate_BF)
    _swiglu[(triton.cdiv(out.numel(), 1024),)](gate_BF, up_BF, out, out.numel(), BLOCK=1024)
    return out
