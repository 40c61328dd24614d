"""The key/value store against a mirror of plain dictionaries."""

import random

import pytest
import torch

from thor.cache import KVCache, round_up
from thor.model import ModelConfig

CONFIG = ModelConfig(vocab_size=10, hidden_size=12, intermediate_size=8, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=3, norm_eps=1e-5, rope_theta=1e4, max_context=64)


def make_cache(num_slots: int = 4, slot_tokens: int = 20) -> KVCache:
    return KVCache(CONFIG, num_slots, slot_tokens, torch.float32, torch.device("cpu"))


def test_writes_and_copies_do_what_a_dictionary_does():
    cache, rng = make_cache(), random.Random(0)
    mirror = {}  # (slot, position, layer) -> (key, value)
    torch.manual_seed(0)
    for _ in range(60):
        if rng.random() < 0.7:
            tokens = rng.sample([(slot, position) for slot in range(4) for position in range(20)], rng.randint(1, 30))
            slots, positions = torch.tensor(tokens).unbind(1)
            for layer in range(2):
                keys, values = torch.randn(2, len(tokens), 2, 3)
                cache.write(layer, slots, positions, keys, values)
                mirror |= {(*token, layer): (keys[i], values[i]) for i, token in enumerate(tokens)}
        else:
            source, target, length = rng.randrange(4), rng.randrange(4), rng.randint(0, 20)
            cache.copy(source, target, length)
            zeros = (torch.zeros(2, 3), torch.zeros(2, 3))
            mirror |= {(target, position, layer): mirror.get((source, position, layer), zeros)
                       for position in range(length) for layer in range(2)}
    assert mirror
    for (slot, position, layer), (key, value) in mirror.items():
        assert torch.equal(cache.keys[layer, slot * 2:slot * 2 + 2, position], key)
        assert torch.equal(cache.values[layer, slot * 2:slot * 2 + 2, position], value)


def test_the_lowest_free_slot_is_taken_first_and_none_when_all_are_busy():
    cache = make_cache()
    assert [cache.take() for _ in range(5)] == [0, 1, 2, 3, None]
    cache.release(2)
    cache.release(1)
    assert [cache.take(), cache.take(), cache.take()] == [1, 2, None]


def test_a_slot_cannot_be_released_twice():
    cache = make_cache()
    cache.release(cache.take())
    with pytest.raises(AssertionError, match="slot 0 released twice"):
        cache.release(0)


def test_slots_hold_whole_blocks_of_keys_and_begin_as_zeros():
    cache = make_cache(slot_tokens=65)
    assert cache.keys.shape == (2, 8, 128, 3)
    assert not cache.keys.any() and not cache.values.any()
    assert [round_up(number, 64) for number in (1, 64, 65)] == [64, 64, 128]


def test_a_cache_without_slots_or_tokens_is_refused():
    with pytest.raises(ValueError, match="0 slots of 20 tokens"):
        make_cache(num_slots=0)
    with pytest.raises(ValueError, match="4 slots of 0 tokens"):
        make_cache(slot_tokens=0)
