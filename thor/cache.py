"""Keys and values of what the model has already read: slots of a fixed number of tokens, copied to fork.

A slot is one page as long as the context: on a CPU that is the fastest layout (a run of neighbouring slots is one view,
read by one matrix product, nothing gathered). Invariant: a slot's contents up to the owner's `cached` length are
exactly what a plain forward of its tokens gives; beyond it lie zeros or leftovers, always finite, always masked.

S slots · K key/value heads · P positions of a slot · D head dim
"""

import heapq

import torch
from torch import Tensor

from thor.model import ModelConfig

# Attention reads keys in blocks of this many positions, so that a row's result does not depend on its batch mates.
KEY_BLOCK = 64


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


class KVCache:
    """Keys and values [layer][S * K, P, D], and the free slots (lowest first, so that busy slots stay neighbours)."""

    def __init__(self, config: ModelConfig, num_slots: int, slot_tokens: int, dtype: torch.dtype, device: torch.device):
        if num_slots < 1 or slot_tokens < 1:
            raise ValueError(f"a cache needs slots and tokens, got {num_slots} slots of {slot_tokens} tokens")
        self.num_slots, self.num_kv_heads = num_slots, config.num_kv_heads
        self.slot_tokens = round_up(slot_tokens, KEY_BLOCK)
        shape = (config.num_layers, num_slots * config.num_kv_heads, self.slot_tokens, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(num_slots))

    def take(self) -> int | None:
        """The lowest free slot, or None."""
        return heapq.heappop(self._free) if self._free else None

    def release(self, slot: int) -> None:
        """Give a slot back; its contents stay until they are overwritten."""
        assert slot not in self._free, f"slot {slot} released twice"
        heapq.heappush(self._free, slot)

    def write(self, layer: int, slots_T: Tensor, positions_T: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> None:
        """Store one key and value per token of the step."""
        for store, new in ((self.keys, keys_TKD), (self.values, values_TKD)):
            by_slot = store[layer].unflatten(0, (self.num_slots, self.num_kv_heads))  # [S, K, P, D]
            by_slot[slots_T, :, positions_T] = new

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the first `length` tokens of `source`, all layers: what a fork costs."""
        for store in (self.keys, self.values):
            by_slot = store.unflatten(1, (self.num_slots, self.num_kv_heads))  # [layers, S, K, P, D]
            by_slot[:, target, :, :length] = by_slot[:, source, :, :length]
