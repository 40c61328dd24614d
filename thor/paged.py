"""Keys and values in pages of a fixed number of tokens, for a GPU: forks share pages, a writer owns its page alone.

Each sequence in memory has a row of the block table, which names its pages in order. Forking copies references only;
a shared page is copied when one of its owners is about to write to it, and that is never more than a sequence's last,
partial one. Invariants: `references` of a page are the rows that name it; a page is written only while that is one;
what lies beyond a sequence's length is finite (zeros or leftovers); page 0 belongs to nobody and takes what padding
writes.

N pages · K key/value heads · P tokens of a page · D head dim
"""

import numpy as np
import torch
from torch import Tensor

from thor.model import ModelConfig

PAGE_TOKENS = 64


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_tokens)


def upload(values: list | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host list or array on the device, without waiting for what the device is doing."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class PagedCache:
    """Keys and values [layer][N, K, P, D] on the device; block table, references and free pages on the host."""

    def __init__(self, config: ModelConfig, num_pages: int, page_tokens: int, max_tokens: int, dtype: torch.dtype,
                 device: torch.device):
        """`num_pages` without page 0; a row of the table has room for `max_tokens`."""
        width = pages_for(max_tokens, page_tokens)
        if page_tokens < 1 or num_pages < width or width < 1:
            raise ValueError(f"{num_pages} pages of {page_tokens} tokens cannot hold a sequence of {max_tokens}")
        self.page_tokens, self.num_kv_heads = page_tokens, config.num_kv_heads
        shape = (config.num_layers, num_pages + 1, config.num_kv_heads, page_tokens, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.tables = np.zeros((num_pages, width), dtype=np.int32)
        self.references = np.zeros(num_pages + 1, dtype=np.int32)
        self._num_pages_of = [0] * num_pages  # of each row
        self._free_pages = list(range(num_pages, 0, -1))
        self._free_rows = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free_pages)

    def take(self) -> int | None:
        """A row of the table without pages, or None when all are taken."""
        return self._free_rows.pop() if self._free_rows else None

    def release(self, row: int) -> None:
        """Give a row and its references back."""
        assert row not in self._free_rows, f"row {row} released twice"
        self.shrink(row, 0)
        self._free_rows.append(row)

    def share(self, source: int, target: int, tokens: int) -> None:
        """Let the empty row `target` refer to the pages of the first `tokens` tokens of `source`: what a fork costs."""
        count = pages_for(tokens, self.page_tokens)
        assert self._num_pages_of[target] == 0, f"row {target} has pages already"
        assert count <= self._num_pages_of[source], f"row {source} has no {tokens} tokens to share"
        pages = self.tables[source, :count]
        self.tables[target, :count] = pages
        self.references[pages] += 1  # no page stands in a row twice
        self._num_pages_of[target] = count

    def shrink(self, row: int, tokens: int) -> None:
        """Forget the pages beyond the first `tokens` tokens."""
        keep, count = pages_for(tokens, self.page_tokens), self._num_pages_of[row]
        if keep < count:
            pages = self.tables[row, keep:count]
            self.references[pages] -= 1
            self._free_pages += pages[self.references[pages] == 0].tolist()
            self.tables[row, keep:count] = 0
            self._num_pages_of[row] = keep

    def missing(self, row: int, start: int, end: int) -> int:
        """Free pages that `prepare` would take."""
        fresh = pages_for(end, self.page_tokens) - self._num_pages_of[row]
        return max(fresh, 0) + len(self._shared(row, start, end))

    def prepare(self, row: int, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions `start` to `end` writable; (source, target) pages to copy before anything is written."""
        assert start <= self._num_pages_of[row] * self.page_tokens, f"row {row} has a gap before position {start}"
        copies = []
        for place in self._shared(row, start, end):
            page = int(self.tables[row, place])
            self.references[page] -= 1
            copies.append((page, self._take_page(row, place)))
        for place in range(self._num_pages_of[row], pages_for(end, self.page_tokens)):
            self._take_page(row, place)
            self._num_pages_of[row] = place + 1
        return copies

    def _shared(self, row: int, start: int, end: int) -> list[int]:
        """Places in the row of existing pages that will be written to and that others refer to, too."""
        last = min(pages_for(end, self.page_tokens), self._num_pages_of[row])
        places = range(start // self.page_tokens, last)
        return [place for place in places if self.references[self.tables[row, place]] > 1]

    def _take_page(self, row: int, place: int) -> int:
        page = self._free_pages.pop()
        assert self.references[page] == 0, f"page {page} was free and referred to"
        self.references[page] = 1
        self.tables[row, place] = page
        return page

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole pages, all layers, as if one after another: a source may be the target of an earlier pair."""
        batch: list[tuple[int, int]] = []
        for source, target in pairs:
            if any(source == earlier for _, earlier in batch):
                self._copy_at_once(batch)
                batch = []
            batch.append((source, target))
        if batch:
            self._copy_at_once(batch)

    def _copy_at_once(self, pairs: list[tuple[int, int]]) -> None:
        sources, targets = upload(pairs, torch.int64, self.keys.device).unbind(1)
        for store in (self.keys, self.values):
            store[:, targets] = store[:, sources]

    def write(self, layer: int, pages_T: Tensor, offsets_T: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> None:
        """Store one key and value per token, at `offsets_T` of `pages_T`."""
        self.keys[layer][pages_T, :, offsets_T] = keys_TKD
        self.values[layer][pages_T, :, offsets_T] = values_TKD
