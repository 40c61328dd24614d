"""Pages against a mirror that copies everything, and attention over them against one row at a time over slots."""

import random

import pytest
import torch
from test_attention import SHAPES, model_of, random_steps

from thor.attention import Row, cached_slow
from thor.cache import KVCache
from thor.model import ModelConfig
from thor.paged import PagedCache
from thor.paged_attention import decode, paged

CONFIG = ModelConfig(vocab_size=10, hidden_size=12, intermediate_size=8, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=3, norm_eps=1e-5, rope_theta=1e4, max_context=64)
CPU = torch.device("cpu")


def contents(cache: PagedCache, row: int, length: int) -> torch.Tensor:
    """Keys and values of a row's first tokens [2, layers, K, length, D], page by page."""
    pages = cache.tables[row, :-(-length // cache.page_tokens)].tolist()
    both = torch.stack((cache.keys, cache.values))[:, :, pages]  # [2, layers, pages, K, P, D]
    return both.transpose(2, 3).flatten(3, 4)[..., :length, :]


class Mirror:
    """Rows as tensors of their own, copied at every fork."""

    def __init__(self):
        self.rows: dict[int, torch.Tensor] = {}

    def check(self, cache: PagedCache) -> None:
        for row, expected in self.rows.items():
            assert torch.equal(contents(cache, row, expected.shape[3]), expected)
        used = [page for row, tokens in self.rows.items() for page in cache.tables[row, :-(-tokens.shape[3] // 4)]]
        assert all(cache.references[page] == used.count(page) for page in set(used))
        assert 0 not in used and cache.num_free == 20 - len(set(used))


@pytest.mark.parametrize("seed", range(4))
def test_forks_truncations_and_writes_do_what_copies_would(seed):
    cache, rng, mirror = PagedCache(CONFIG, 20, 4, 30, torch.float32, CPU), random.Random(seed), Mirror()
    torch.manual_seed(seed)
    copied = 0
    for _ in range(300):
        kind, row = rng.choice(["take", "fork", "write", "write", "write", "truncate", "release"]), None
        if mirror.rows:
            row = rng.choice(list(mirror.rows))
        if kind == "take" and len(mirror.rows) < 8 or row is None:
            mirror.rows[cache.take()] = torch.zeros(2, 2, 2, 0, 3)
        elif kind == "fork" and len(mirror.rows) < 8:
            length, child = rng.randint(0, mirror.rows[row].shape[3]), cache.take()
            cache.share(row, child, length)
            mirror.rows[child] = mirror.rows[row][..., :length, :].clone()
        elif kind == "truncate":
            length = rng.randint(0, mirror.rows[row].shape[3])
            cache.shrink(row, length)
            mirror.rows[row] = mirror.rows[row][..., :length, :]
        elif kind in ("take", "fork", "release"):
            cache.release(row)
            del mirror.rows[row]
        else:
            copied += write(cache, mirror, row, rng)
        mirror.check(cache)
    assert copied > 2


def write(cache: PagedCache, mirror: Mirror, row: int, rng: random.Random) -> int:
    """Append random tokens if pages are left, as an engine does; the pages that were copied for it."""
    start = mirror.rows[row].shape[3]
    end = min(start + rng.randint(1, 9), 30)
    missing = cache.missing(row, start, end)
    if end == start or missing > cache.num_free:
        return 0
    free = cache.num_free
    pairs = cache.prepare(row, start, end)
    assert free - cache.num_free == missing and len(pairs) <= 1
    cache.copy(pairs)
    new = torch.randn(2, 2, 2, end - start, 3)
    positions = torch.arange(start, end)
    pages = torch.tensor(cache.tables[row, (positions // 4).tolist()]).long()
    for layer in range(2):
        cache.write(layer, pages, positions % 4, new[0, layer].transpose(0, 1), new[1, layer].transpose(0, 1))
    mirror.rows[row] = torch.cat((mirror.rows[row], new), dim=3)
    return len(pairs)


def test_a_fork_copies_nothing_and_its_first_token_one_page_at_most():
    cache = PagedCache(CONFIG, 20, 4, 30, torch.float32, CPU)
    parent, child = cache.take(), cache.take()
    cache.prepare(parent, 0, 14)
    cache.share(parent, child, 14)
    assert cache.num_free == 16
    assert cache.prepare(child, 14, 15) == [(int(cache.tables[parent, 3]), int(cache.tables[child, 3]))]
    assert cache.num_free == 15
    assert cache.prepare(parent, 14, 15) == []  # its last page is its own again
    assert cache.prepare(child, 15, 17) == [] and cache.num_free == 14


def test_a_page_copied_to_and_copied_from_in_one_go_arrives():
    cache = PagedCache(CONFIG, 20, 4, 30, torch.float32, CPU)
    cache.keys.normal_()
    expected = cache.keys[:, 5].clone()
    cache.copy([(5, 6), (6, 7), (8, 5)])
    assert torch.equal(cache.keys[:, 6], expected) and torch.equal(cache.keys[:, 7], expected)
    assert torch.equal(cache.keys[:, 5], cache.keys[:, 8])


def test_misuse_is_named():
    with pytest.raises(ValueError, match="3 pages of 4 tokens cannot hold a sequence of 30"):
        PagedCache(CONFIG, 3, 4, 30, torch.float32, CPU)
    cache = PagedCache(CONFIG, 20, 4, 30, torch.float32, CPU)
    row = cache.take()
    with pytest.raises(AssertionError, match="gap before position 5"):
        cache.prepare(row, 5, 6)
    cache.release(row)
    with pytest.raises(AssertionError, match="released twice"):
        cache.release(row)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_over_pages_equals_one_row_at_a_time_over_slots(shape):
    heads, kv_heads, head_dim = shape
    config, rng = model_of(shape).config, random.Random(0)
    slow = KVCache(config, 7, 100, torch.float64, CPU)
    fast = PagedCache(config, 7 * 13, 8, 100, torch.float64, CPU)
    slots = [fast.take() for _ in range(7)]
    steps = random_steps(rng, [100, 3, 60, 80, 41, 20, 50], list(range(7)), chunk=30)
    assert any(all(row.count == 1 for _, row in step) for step in steps)
    torch.manual_seed(0)
    for step in steps:
        rows = [Row(slots[row.slot], row.start, row.count) for _, row in step]
        for row in rows:
            fast.prepare(row.slot, row.start, row.start + row.count)
        tokens = sum(row.count for row in rows)
        attends = [paged(fast, rows)]
        if all(row.count == 1 for row in rows):
            table = torch.tensor(fast.tables[[row.slot for row in rows]])
            attends.append(decode(fast, table, torch.tensor([row.start for row in rows], dtype=torch.int32), False))
        for layer in range(2):
            q, k, v = (torch.randn(tokens, n, head_dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
            expected = cached_slow(slow, [row for _, row in step])(layer, q, k, v)
            for attend in attends:
                torch.testing.assert_close(attend(layer, q, k, v), expected, atol=1e-12, rtol=0)
