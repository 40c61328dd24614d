"""Packed attention against a written-out softmax, cached against its slow twin, a token's bits in any batch."""

import random

import pytest
import torch

from thor.attention import Row, cached, cached_slow, feed, head, packed
from thor.cache import KVCache
from thor.model import Decoder, ModelConfig

SHAPES = {  # H, K, D
    "one query head a key head": (5, 5, 12),
    "groups of three": (9, 3, 16),
    "groups of seven": (14, 2, 8),
    "one key head": (6, 1, 8),
    "wide heads": (4, 2, 128),
}


@pytest.fixture(params=SHAPES)
def shape(request) -> tuple[int, int, int]:
    return SHAPES[request.param]


def model_of(shape, vocab_size=211, hidden_size=60, intermediate_size=150, qk_norm=False) -> Decoder:
    """A random decoder; the sizes are no multiples of anything that a CPU likes."""
    heads, kv_heads, head_dim = shape
    config = ModelConfig(vocab_size, hidden_size, intermediate_size, 2, heads, kv_heads, head_dim, 1e-5, 1e4, 4096,
                         qkv_bias=not qk_norm, qk_norm=qk_norm)
    generator, model = torch.Generator().manual_seed(0), Decoder(config)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1.5 * noise / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 1.0 + 0.3 * noise
    return model


def written_out(q, k, v):
    """Causal softmax attention of one sequence, token by token and head by head, in float64."""
    out, group = torch.zeros_like(q, dtype=torch.float64), q.shape[1] // k.shape[1]
    for token in range(len(q)):
        for h in range(q.shape[1]):
            keys, values = k[:token + 1, h // group].double(), v[:token + 1, h // group].double()
            weights = (keys @ q[token, h].double() / q.shape[2] ** 0.5).exp()
            out[token, h] = weights @ values / weights.sum()
    return out


def test_packed_attention_is_causal_softmax_within_each_sequence(shape):
    heads, kv_heads, head_dim = shape
    torch.manual_seed(0)
    lengths = [7, 1, 12]
    q, k, v = (torch.randn(20, n, head_dim) for n in (heads, kv_heads, kv_heads))
    expected = [written_out(*parts) for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths))]
    torch.testing.assert_close(packed(lengths)(0, q, k, v).double(), torch.cat(expected), atol=1e-5, rtol=0)


def random_steps(rng: random.Random, lengths: list[int], slots: list[int], chunk: int) -> list[list[tuple[int, Row]]]:
    """Steps of (sequence, row) in order of slot, that feed all sequences to their end in pieces of random size."""
    done, steps = [0] * len(lengths), []
    while done != lengths:
        step = []
        for i in sorted(range(len(lengths)), key=lambda i: slots[i]):
            left = lengths[i] - done[i]
            if left and rng.random() < 0.8:
                count = 1 if rng.random() < 0.6 else rng.randint(1, min(chunk, left))
                step.append((i, Row(slots[i], done[i], count)))
                done[i] += count
        steps += [step] if step else []
    return steps


def test_cached_attention_equals_its_slow_twin(shape):
    heads, kv_heads, head_dim = shape
    config, rng = model_of(shape).config, random.Random(0)
    fast, slow = (KVCache(config, 32, 100, torch.float32, torch.device("cpu")) for _ in range(2))
    torch.manual_seed(0)
    slots = [6, 0, 1, 2, 5, 20, 31]  # neighbours, near ones with a gap between them, and far ones
    for step in random_steps(rng, [100, 3, 60, 80, 41, 20, 50], slots, chunk=30):
        rows = [row for _, row in step]
        tokens = sum(row.count for row in rows)
        for layer in range(2):
            q, k, v = (torch.randn(tokens + 3, n, head_dim) for n in (heads, kv_heads, kv_heads))  # 3 rows of padding
            expected = cached_slow(slow, rows)(layer, q[:tokens], k[:tokens], v[:tokens])
            got = cached(fast, rows, heads)(layer, q, k, v)
            torch.testing.assert_close(got[:tokens], expected, atol=1e-5, rtol=0)
            assert not got[tokens:].any()
    assert torch.equal(fast.keys, slow.keys) and torch.equal(fast.values, slow.values)


@torch.inference_mode()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("longest, chunk", [(90, 30), (700, 300)])
def test_a_token_has_the_same_bits_whatever_its_batch_mates(shape, qk_norm, longest, chunk):
    assert_same_bits(model_of(shape, qk_norm=qk_norm), 10, longest, chunk)


@torch.inference_mode()
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_token_has_the_same_bits_for_every_fixed_number_of_threads(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_same_bits(model_of((9, 3, 64), 4099, 576, 1536), 8, 90, 40)
        assert_same_bits(model_of((7, 1, 32), 515, 300, 1000), 8, 90, 40)
    finally:
        torch.set_num_threads(before)


def assert_same_bits(model: Decoder, num_sequences: int, longest: int, chunk: int) -> None:
    """Logits of each sequence alone in one pass, against those in random pieces among the others, over stale caches."""
    rng, vocab_size = random.Random(0), model.config.vocab_size
    lengths = [rng.randint(longest // 2, longest) for _ in range(num_sequences)]
    sequences = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    alone = []
    for ids in sequences:
        cache = KVCache(model.config, 1, longest, torch.float32, torch.device("cpu"))
        alone.append(head(model, feed(model, cache, [Row(0, 0, len(ids))], ids, exact=True)[:len(ids)], exact=True))
    slots = rng.sample(range(num_sequences + 3), num_sequences)
    cache = KVCache(model.config, num_sequences + 3, longest, torch.float32, torch.device("cpu"))
    for store in (cache.keys, cache.values):
        store.normal_()
    for step in random_steps(rng, lengths, slots, chunk):
        ids = [token for i, row in step for token in sequences[i][row.start:row.start + row.count]]
        hidden = feed(model, cache, [row for _, row in step], ids, exact=True)
        logits = head(model, hidden[:len(ids)], exact=True).split([row.count for _, row in step])
        for (i, row), got in zip(step, logits):
            assert torch.equal(got, alone[i][row.start:row.start + row.count])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("shape_name", ["groups of seven", "wide heads"])
def test_the_kernel_over_the_whole_stream_equals_one_sequence_at_a_time_forward_and_backward(shape_name):
    """In bfloat16 against the slow twin in float32 on the same numbers."""
    heads, kv_heads, head_dim = SHAPES[shape_name]
    torch.manual_seed(0)
    lengths = [300, 1, 77]
    given = [torch.randn(378, n, head_dim, device="cuda").bfloat16() for n in (heads, kv_heads, kv_heads)]
    fast, slow = ([x.to(dtype).requires_grad_() for x in given] for dtype in (torch.bfloat16, torch.float32))
    results = [packed(lengths)(0, *inputs) for inputs in (fast, slow)]
    for result in results:
        result.float().square().sum().backward()
    torch.testing.assert_close(results[0].float(), results[1], atol=2e-2, rtol=2e-2)
    for found, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(found.grad.float(), expected.grad, atol=5e-2 * expected.grad.abs().max().item(), rtol=5e-2)
