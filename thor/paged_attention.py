"""Attention over a paged cache: a prefill chunk of several sequences, and one new token each of many.

`attend_pages` gathers pages and calls torch's attention. It is the definition, runs anywhere, and serves prefill, where
it is fast enough. For single tokens on a GPU `thor.kernels` reads the pages where they lie; its equality with
`attend_pages` is a test. Nothing here waits for the device.

R rows · C new tokens of a row · H query heads · K key/value heads · N pages of a row · P tokens of a page · D head dim
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thor.attention import Row
from thor.model import Attend
from thor.paged import PagedCache, pages_for, upload


@functools.cache
def kernels_available(device: torch.device) -> bool:
    """Whether Triton is installed and can run here: on a GPU, or, to test the kernels, in its interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None


def attend_pages(q_RCHD: Tensor, keys: Tensor, values: Tensor, table_RN: Tensor, positions_RC: Tensor) -> Tensor:
    """Each query sees its row's keys up to its own position. keys and values [pages, K, P, D] -> [R, C, H, D]."""
    num_rows, count, num_heads, head_dim = q_RCHD.shape
    heads = keys.shape[1]
    k, v = (store[table_RN].transpose(1, 2).reshape(num_rows, heads, -1, head_dim) for store in (keys, values))
    group = num_heads // heads
    q = q_RCHD.view(num_rows, count, heads, group, head_dim).transpose(1, 2).reshape(num_rows, heads, -1, head_dim)
    visible = torch.arange(k.shape[2], device=k.device) <= positions_RC[..., None]  # [R, C, N * P]
    mask = visible.repeat_interleave(group, dim=1)[:, None]  # query rows of a head come token by token
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.view(num_rows, heads, count, group, head_dim).transpose(1, 2).reshape(q_RCHD.shape)


@dataclass(frozen=True)
class _Piece:
    """Rows of nearly the same number of new tokens, padded to the longest."""

    tokens: Tensor  # [R, C], where in the stream; padding repeats the row's last token
    kept: Tensor  # [tokens], which of the R * C results are no padding
    stream: Tensor  # [tokens], where in the stream these go
    table: Tensor  # [R, N]
    positions: Tensor  # [R, C]


def paged(cache: PagedCache, rows: list[Row]) -> Attend:
    """Store the new keys and values of `rows`, whose tokens lie one after another in the stream, and attend."""
    device = cache.keys.device
    slots = [row.slot for row in rows for _ in range(row.count)]
    positions = [row.start + i for row in rows for i in range(row.count)]
    pages = cache.tables[slots, [position // cache.page_tokens for position in positions]]
    pages_T = upload(pages, torch.int64, device)
    offsets_T = upload([position % cache.page_tokens for position in positions], torch.int64, device)
    pieces = [_piece(cache, rows, members) for members in _alike(rows)]

    def attend(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        cache.write(layer, pages_T, offsets_T, k_TKD, v_TKD)
        out = torch.empty_like(q_THD)
        for piece in pieces:
            mixed = attend_pages(q_THD[piece.tokens], cache.keys[layer], cache.values[layer], piece.table,
                                 piece.positions)
            out[piece.stream] = mixed.flatten(0, 1)[piece.kept]
        return out

    return attend


def _alike(rows: list[Row]) -> list[list[int]]:
    """Indices of the rows by how many bits their count has, so that padding at most doubles them."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.count - 1).bit_length(), []).append(index)
    return list(groups.values())


def _piece(cache: PagedCache, rows: list[Row], members: list[int]) -> _Piece:
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.count)
    longest = max(rows[i].count for i in members)
    places = [[min(c, rows[i].count - 1) for c in range(longest)] for i in members]
    tokens = [[starts[i] + c for c in row] for i, row in zip(members, places, strict=True)]
    kept = [r * longest + c for r, i in enumerate(members) for c in range(rows[i].count)]
    stream = [starts[i] + c for i in members for c in range(rows[i].count)]
    width = max(pages_for(rows[i].start + rows[i].count, cache.page_tokens) for i in members)
    table = cache.tables[[rows[i].slot for i in members], :width]
    positions = [[rows[i].start + c for c in row] for i, row in zip(members, places, strict=True)]
    arrays = (tokens, kept, stream, table, positions)
    return _Piece(*(upload(values, torch.int64, cache.keys.device) for values in arrays))


def decode(cache: PagedCache, table_RN: Tensor, positions_R: Tensor, use_kernels: bool) -> Attend:
    """One new token a row: store its key and value, attend to all before it. All sizes are fixed: fit for a graph."""
    pages_R = table_RN.gather(1, (positions_R // cache.page_tokens)[:, None].long())[:, 0].long()
    offsets_R = (positions_R % cache.page_tokens).long()

    def attend(layer: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> Tensor:
        cache.write(layer, pages_R, offsets_R, k_RKD, v_RKD)
        keys, values = cache.keys[layer], cache.values[layer]
        if use_kernels:
            from thor import kernels  # needs Triton, which a CPU does without

            return kernels.paged_decode(q_RHD, keys, values, table_RN, positions_R)
        return attend_pages(q_RHD[:, None], keys, values, table_RN.long(), positions_R[:, None])[:, 0]

    return attend
