"""What only a GPU can show: graphs, kernels in low precision, the paged engine and the trainer as they are used there.

    python -m pytest tests/test_cuda.py tests/test_kernels.py
"""

import asyncio
import random
from pathlib import Path

import pytest
import torch
from test_attention import model_of
from test_engine import NO_EOS, random_program, run
from test_model import some_sequences
from test_paged_engine import together

from thor.attention import packed
from thor.batch import Sample, make_pack, score
from thor.decode_step import DecodeStep, NextToken
from thor.engine import Engine, Sequence
from thor.model import Decoder, compile_layers
from thor.optimizer import Skips, make_optimizer, take_step
from thor.paged import PagedCache
from thor.paged_attention import kernels_available
from thor.paged_engine import PagedEngine, make_engine
from thor.parallel import full_copy, full_parameters, load_optimizer, open_ranks, save_checkpoint, shard
from thor.sampling import Sampling, noise_key

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
CUDA = torch.device("cuda")
SHAPE = (12, 2, 64)


@pytest.fixture
def exact_products():
    """float32 products as they are, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def gpu_model(dtype: torch.dtype = torch.float32) -> Decoder:
    return model_of(SHAPE).to(CUDA, dtype)


def steps(use_kernels: bool, use_graphs: bool, dtype: torch.dtype) -> list[tuple[list[int], list[float]]]:
    """Twenty steps of up to five rows, the number of rows changing, each step launched before the last one is read."""
    model = gpu_model(dtype)
    cache = PagedCache(model.config, 40, 16, 60, dtype, CUDA)
    decoder, rng = DecodeStep(model, cache, 5, use_kernels, use_graphs), random.Random(0)
    rows = [cache.take() for _ in range(5)]
    for row in rows:
        cache.prepare(row, 0, 60)
    found, before, source = [], None, [-1] * 5
    for position in range(20):
        chosen = rows[:1 + position % 5] if position % 7 else rows
        tokens = [NextToken(row, position, 7 + row, source[i], rng.random(), Sampling(0.8) if i % 2 else Sampling())
                  for i, row in enumerate(chosen)]
        launched = decoder.launch(tokens)
        source = [i if i < len(chosen) else -1 for i in range(5)]
        found += [before.results()] if before else []
        before = launched
    return [*found, before.results()]


@pytest.mark.parametrize("use_kernels", [False, True])
def test_a_graph_samples_what_its_code_samples_when_it_is_run(use_kernels, exact_products):
    if use_kernels and not kernels_available(CUDA):
        pytest.skip("Triton is not installed")
    assert steps(use_kernels, True, torch.bfloat16) is not None  # low precision runs; float32 is what is compared
    graphs, eagers = (steps(use_kernels, use_graphs, torch.float32) for use_graphs in (True, False))
    for graph, eager in zip(graphs, eagers, strict=True):
        assert graph[0] == eager[0]
        assert graph[1] == pytest.approx(eager[1], abs=1e-4)


def test_kernels_sample_what_plain_torch_samples(exact_products):
    if not kernels_available(CUDA):
        pytest.skip("Triton is not installed")
    for fused, plain in zip(steps(True, False, torch.float32), steps(False, False, torch.float32), strict=True):
        assert fused[0] == plain[0]
        assert fused[1] == pytest.approx(plain[1], abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("arrangement", [{}, {"use_kernels": False}, {"use_graphs": False}],
                         ids=["as used", "no kernels", "no graphs"])
def test_the_engine_samples_what_a_plain_forward_on_the_cpu_gives_its_noise(arrangement, exact_products):
    cpu, model = model_of(SHAPE, vocab_size=131), model_of(SHAPE, vocab_size=131).to(CUDA)
    engine = PagedEngine(model, {3, 5}, 6, 60, chunk_tokens=7, page_tokens=16, num_pages=12, **arrangement)
    errors = run(random_program(engine, cpu, random.Random(0)))
    assert engine.counts.evictions and engine.counts.copied and engine.counts.discarded
    assert len(errors) > 100
    assert max(errors) < 2e-3 and sum(errors) / len(errors) < 2e-4


def test_trajectories_are_those_of_the_cpu_but_for_rare_flips(exact_products):
    """In float32 a sum in another order flips a token now and then, and what follows it is another trajectory."""
    expected = run(together(Engine(model_of(SHAPE, vocab_size=131), {3}, 40, 150), 0))
    got = run(together(PagedEngine(model_of(SHAPE, vocab_size=131).to(CUDA), {3}, 40, 150), 0))
    ids = [[[branch[0] for branch in one] if i < 6 else one[-1][0] for i, one in enumerate(side)]
           for side in (got, expected)]
    same = sum(ours == theirs for ours, theirs in zip(*ids, strict=True))
    assert same >= 10


@torch.no_grad()
def test_the_trainer_agrees_with_the_sampler_in_bfloat16_on_average():
    model = gpu_model(torch.bfloat16)
    engine = make_engine(model, NO_EOS, 16, 200)
    assert isinstance(engine, PagedEngine)

    async def sample() -> list[Sequence]:
        sequences = [engine.new(ids, noise_key(i)) for i, ids in enumerate(some_sequences([40] * 16))]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 100) for sequence in sequences))
        return sequences

    samples = [Sample(sequence.ids, [p is not None for p in sequence.logprobs],
                      [p for p in sequence.logprobs if p is not None]) for sequence in run(sample())]
    scored, _ = score(model, make_pack(samples, CUDA))
    sampled = torch.tensor([p for sample in samples for p in sample.sampler_logprobs], device=CUDA)
    assert (scored - sampled).abs().mean() < 0.1


def test_packed_attention_in_bfloat16_is_its_slow_twins_forward_and_backward():
    torch.manual_seed(0)
    lengths, found = [7, 1, 130, 64], []
    drawn = [torch.randn(sum(lengths), heads, 64).bfloat16() for heads in (12, 2, 2, 12)]
    for device, dtype in (("cpu", torch.float32), (CUDA, torch.bfloat16)):
        q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in drawn[:3])
        out = packed(lengths)(0, q, k, v)
        out.backward(drawn[3].to(device, dtype))
        found.append([tensor.detach().float().cpu() for tensor in (out, q.grad, k.grad, v.grad)])
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=5e-2, rtol=5e-2)


def trained(device: str, directory: Path, offload: bool = False, compiled: bool = False) -> list[float]:
    """Losses and norms of four steps in bfloat16 with float32 shares, a checkpoint and a sampler's copy in between."""
    samples = [Sample(ids, [False] + [True] * (len(ids) - 1), []) for ids in some_sequences([30, 50, 1, 90])]
    (directory / "config.json").write_text('{"model_type": "llama"}')
    found = []
    with open_ranks(device, mixed=True) as ranks:
        for half in range(2):
            model = model_of(SHAPE, vocab_size=131)
            if half:
                model.load_state_dict(weights, assign=True)
            model = shard(model, ranks, torch.float32, torch.bfloat16, offload)
            model.checkpoint_layers = True
            if compiled:
                compile_layers(model)
            optimizer = make_optimizer(model, 1e-3, (0.9, 0.999), 0.0)
            if half:
                load_optimizer(ranks, checkpoint, model, optimizer)
            for _ in range(2):
                loss = -score(model, make_pack(samples, device), chunk_tokens=64)[0].mean()
                loss.backward()
                found += [loss.item(), take_step(model, optimizer, loss.item(), 1e-3, 1.0, Skips())]
            checkpoint = save_checkpoint(ranks, directory, half, model, optimizer, directory, {}, 0)
            weights = {name: tensor.cpu() for name, tensor in full_parameters(model)}
            sampler = full_copy(model, torch.bfloat16, device)
            assert sampler.head_weight.dtype == torch.bfloat16 and sampler.head_weight.device.type == device
            assert torch.equal(sampler.head_weight.cpu(), weights["lm_head.weight"].bfloat16())
    return found


@pytest.mark.parametrize("offload, compiled", [(False, False), (True, False), (False, True)],
                         ids=["as it is", "offload", "compile"])
def test_one_gpu_trains_as_a_cpu_does(offload, compiled, tmp_path):
    for name in ("cpu", "gpu"):
        (tmp_path / name).mkdir()
    expected = trained("cpu", tmp_path / "cpu")
    assert trained("cuda", tmp_path / "gpu", offload, compiled) == pytest.approx(expected, rel=3e-2)
