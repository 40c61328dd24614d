"""The memory calculator against the bytes that the code really holds, and the recipes against the scripts' flags."""

import random
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from torch.utils.flop_counter import FlopCounterMode

from evaluate import EvaluateOptions
from thor import config, plan, plan_round
from thor.batch import Pack, Sample, loss_tokens, make_pack, score
from thor.cache import KVCache
from thor.grpo import Counts, LossOptions, Tokens, count_tokens, hierarchical_loss
from thor.model import Attend, Decoder, ModelConfig
from thor.optimizer import make_optimizer
from thor.plan import PlanOptions
from thor.plan_round import RoundOptions
from tirgen import TirgenOptions
from train_rl import TrainOptions
from train_sft import SftOptions

ROOT = Path(__file__).parent.parent

SMALL = ModelConfig(vocab_size=4000, hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2,
                    head_dim=32, norm_eps=1e-6, rope_theta=1e4, max_context=4096, qkv_bias=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _OneKernel(torch.autograd.Function):
    """Keeps what a variable-length attention kernel keeps: its inputs, its output, a float32 number for each head."""

    @staticmethod
    def forward(ctx, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        out, log_sum = torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out, log_sum)
        return out

    @staticmethod
    def backward(ctx, grad_THD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class VarlenDecoder(Decoder):
    """The model with attention as it is on CUDA, as far as memory goes."""

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, attend: Attend) -> torch.Tensor:
        return super().forward(token_ids_T, positions_T, lambda layer, q, k, v: _OneKernel.apply(q, k, v))


MODELS = {"sdpa": Decoder, "varlen": VarlenDecoder}
Batch = tuple[Pack, Tokens, Counts]


def make_batch(tokens: int, vocab: int, length: int = 512) -> Batch:
    """Sequences of `length` tokens, all but the first of each trained."""
    rng, trained = random.Random(0), [False] + [True] * (length - 1)
    logprobs = [-1.0] * (length - 1)
    samples = [Sample([rng.randrange(vocab) for _ in range(length)], trained, logprobs, logprobs,
                      advantage=1.0 - 2 * (number % 2)) for number in range(tokens // length)]
    pack = make_pack(samples)
    known = loss_tokens(samples, pack)
    return pack, known, count_tokens(known)


def fake_batch(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The same without memory."""
    pack, known, counts = batch
    fake_pack = Pack(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in vars(pack).values()))
    return fake_pack, Tokens(*map(mode.from_tensor, vars(known).values())), counts


def build(shape: ModelConfig, options: PlanOptions) -> Decoder:
    """A model whose parameters have the dtype of the arithmetic, as FSDP2 makes them for it."""
    torch.set_default_dtype(DTYPES[options.dtype])
    try:
        model = MODELS[options.attention](shape)
    finally:
        torch.set_default_dtype(torch.float32)
    model.checkpoint_layers = options.checkpoint_layers
    return model


def measure(model: Decoder, batch: Batch, live: LiveBytes) -> tuple[int, int]:
    """Bytes kept by a forward pass, and the peak of forward and backward, both above what was there; the second of two
    packs, so that gradients are there and added to."""
    pack, known, counts = batch
    with live:
        for _ in range(2):
            before = live.restart()
            loss = hierarchical_loss(score(model, pack)[0], known, counts, LossOptions())
            kept = live.now - before
            loss.backward()
            del loss
    return kept, live.peak - before


def measure_one(shape: ModelConfig, options: PlanOptions, fake: bool = False) -> tuple[int, int]:
    """`measure` in one process, with fake tensors if the model is large."""
    batch, live = make_batch(options.tokens, shape.vocab_size), LiveBytes()
    if not fake:
        return measure(build(shape, options), batch, live)
    with FakeTensorMode() as mode:
        return measure(build(shape, options), fake_batch(batch, mode), live)


def options_for(tokens: int, gpus: int = 1, dtype: str = "float32", attention: str = "sdpa",
                checkpoint_layers: bool = False) -> PlanOptions:
    return PlanOptions(model="", gpus=gpus, tokens=tokens, dtype=dtype, attention=attention,
                       checkpoint_layers=checkpoint_layers)


@pytest.mark.parametrize("shape", [*plan.SHAPES.values(), SMALL, replace(SMALL, o_bias=True, tied_head=True)])
def test_parameters_are_counted_as_the_model_has_them(shape):
    with torch.device("meta"):
        model = Decoder(shape)
    assert plan.num_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    assert plan.layer_parameters(shape) == sum(p.numel() for p in model.model["layers"][0].parameters())


def test_the_named_shapes_have_the_published_number_of_parameters():
    billions = {name: round(plan.num_parameters(shape) / 1e9, 2) for name, shape in plan.SHAPES.items()}
    assert billions == {"Qwen2.5-Math-1.5B": 1.54, "Qwen2.5-Math-7B": 7.62, "Qwen3-1.7B": 1.72, "Qwen3-4B": 4.02,
                        "Qwen3-8B": 8.19}


@pytest.mark.parametrize("attention", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_layer_keeps_as_many_bytes_as_calculated(attention, dtype, qk_norm):
    shape, options = replace(SMALL, qk_norm=qk_norm), options_for(512, dtype=dtype, attention=attention)
    more, less = (measure_one(replace(shape, num_layers=layers), options)[0] for layers in (2, 1))
    calculated = plan.saved_by_layer(shape, options.compute_bytes, attention)
    assert (more - less) / options.tokens == pytest.approx(calculated, rel=1e-3)


def calculated_peak(shape: ModelConfig, options: PlanOptions) -> float:
    """Of a backward pass, above weights and gradients."""
    return plan.activations(shape, options) + max(plan.head_temporaries(shape, options),
                                                  plan.layer_temporaries(shape, options))


LARGE = [("Qwen2.5-Math-1.5B", 4096, "bfloat16", False),
         *(pytest.param(*case, marks=pytest.mark.slow) for case in (
             ("Qwen2.5-Math-1.5B", 4096, "float32", False), ("Qwen2.5-Math-7B", 8192, "bfloat16", False),
             ("Qwen3-8B", 16384, "bfloat16", True)))]


@pytest.mark.parametrize(("name", "tokens", "dtype", "checkpoint_layers"), LARGE)
def test_the_step_of_a_large_model_peaks_as_calculated(name, tokens, dtype, checkpoint_layers):
    """The real code on fake tensors, some layers of the model; the calculation is linear in their number."""
    shape = replace(plan.SHAPES[name], num_layers=2)
    options = options_for(tokens, dtype=dtype, attention="varlen", checkpoint_layers=checkpoint_layers)
    kept, peak = measure_one(shape, options, fake=True)
    assert kept == pytest.approx(plan.activations(shape, options), rel=0.01)
    assert peak == pytest.approx(calculated_peak(shape, options), rel=0.15)


@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_a_real_step_on_the_cpu_peaks_as_calculated(checkpoint_layers):
    options = options_for(1024, checkpoint_layers=checkpoint_layers)
    kept, peak = measure_one(SMALL, options)
    assert kept == pytest.approx(plan.activations(SMALL, options), rel=0.01)
    assert peak == pytest.approx(calculated_peak(SMALL, options), rel=0.15)


@contextmanager
def imagined_ranks(number: int) -> Iterator[DeviceMesh]:
    """This process as the first of `number` ranks; the others are not there and nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (number,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("tokens", "tolerance"), [(512, 0.02), pytest.param(8192, 0.15, marks=pytest.mark.slow)])
def test_a_sharded_step_peaks_as_calculated(tokens, tolerance):
    """A rank of 8, all of whose bytes are counted; with few tokens the whole gradients of embedding and head decide."""
    shape = replace(plan.SHAPES["Qwen2.5-Math-7B"], num_layers=3)
    options = options_for(tokens, gpus=8, dtype="bfloat16", attention="varlen")
    batch, live = make_batch(tokens, shape.vocab_size), LiveBytes()
    with imagined_ranks(8) as mesh, FakeTensorMode() as mode:
        model = build(shape, replace(options, dtype="float32"))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for layer in model.model["layers"]:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        live.watch([parameter.to_local() for parameter in model.parameters()])
        measure(model, fake_batch(batch, mode), live)
    sums = plan.totals(plan.memory(shape, options))
    moments = 8 * plan.num_parameters(shape) / 8  # which there are none of before the first optimizer step
    assert live.peak == pytest.approx(max(sums["head"], sums["layer"], sums["end"]) - moments, rel=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_take_what_the_cache_takes(dtype):
    live = LiveBytes()
    with FakeTensorMode(), live:
        cache = KVCache(SMALL, 3, 200, DTYPES[dtype], torch.device("cpu"))
    calculated = plan.kv_bytes(SMALL, options_for(1, dtype=dtype).compute_bytes)
    assert live.now == 3 * cache.slot_tokens * calculated


def test_the_optimizer_holds_two_numbers_a_parameter():
    model, live = build(SMALL, options_for(1)), LiveBytes()
    optimizer = make_optimizer(model, 1e-6, (0.9, 0.999), 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    live.watch([(parameter, parameter.grad) for parameter in model.parameters()])
    before = live.now
    with live:
        optimizer.step()
    held = 8 * plan.num_parameters(SMALL)
    assert live.now - before == pytest.approx(held, rel=1e-3)
    largest = 4 * SMALL.vocab_size * SMALL.hidden_size
    assert live.peak - before < held + 3 * largest  # a CPU takes one parameter at a time; CUDA's kernel needs nothing


def test_more_gpus_and_smaller_packs_never_need_more():
    options = options_for(8192, gpus=8, dtype="bfloat16", attention="varlen")
    shape = plan.SHAPES["Qwen2.5-Math-7B"]
    needed = [plan.peak(shape, replace(options, gpus=gpus)) for gpus in (2, 8, 32, 64)]
    assert needed == sorted(needed, reverse=True)
    assert plan.peak(shape, replace(options, tokens=4096)) <= plan.peak(shape, options)
    assert plan.peak(shape, replace(options, gpus=32, replicas=4)) == plan.peak(shape, options)


def test_the_largest_pack_fits_and_a_larger_one_does_not():
    shape, options = plan.SHAPES["Qwen2.5-Math-7B"], options_for(1, gpus=8, dtype="bfloat16", attention="varlen")
    tokens = plan.largest_pack(shape, options)
    assert tokens % 1024 == 0
    this, larger = (plan.peak(shape, replace(options, tokens=number)) for number in (tokens, tokens + 1024))
    assert this <= options.memory * plan.GIB < larger


def test_the_table_says_what_fits(capsys):
    plan.main(["--plan", "Qwen2.5-Math-7B", "--gpus", "8", "--tokens", "16384", "--checkpoint-layers"])
    out = capsys.readouterr().out
    assert "7.62 billion parameters" in out
    assert "fits:" in out and "largest pack, --checkpoint_layers" in out


@pytest.mark.parametrize(("argv", "complaint"), [
    (["--model", "no-such-model"], "'no-such-model' is neither a directory with a config.json nor one of"),
    (["--model", "Qwen3-8B", "--gpus", "8", "--replicas", "3"], "replicas is 3; it must divide the number of GPUs"),
    (["--model", "Qwen3-8B", "--dtype", "int8"], "dtype must be bfloat16 or float32"),
    (["--model", "Qwen3-8B", "--tokens", "0"], "tokens is 0; it must be 1 or more"),
])
def test_what_makes_no_sense_is_one_sentence_and_exit_code_2(argv, complaint, capsys):
    with pytest.raises(SystemExit) as exit_info:
        plan.main(argv)
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(("change", "complaint"), [
    (["--updates", "0"], "updates is 0; it must be above 0"), (["--mfu", "nan"], "mfu is nan; it must be above 0"),
    (["--device", "A100"], "device is 'A100'; it must be one of H100, H200")])
def test_an_assumption_that_makes_no_sense_is_one_sentence_and_exit_code_2(change, complaint, capsys):
    with pytest.raises(SystemExit) as exit_info:
        config.run(plan_round.show, RoundOptions, "", ["--model", "Qwen3-8B", *change])
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nodes"], ["--nodes", "x"], ["--gpus", "0"], ["--nodes", "2", "--gpus"]])
def test_a_number_of_machines_or_gpus_that_is_none_is_one_sentence_and_exit_code_2(arguments):
    done = subprocess.run(["bash", ROOT / "runs/qwen3-8b.sh", "--print", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "must be 1 or more" in done.stderr


RECIPES = ["qwen2.5-math-1.5b", "qwen2.5-math-7b", "qwen3-8b"]
OPTIONS = {"tirgen.py": TirgenOptions, "train_sft.py": SftOptions, "train_rl.py": TrainOptions,
           "evaluate.py": EvaluateOptions}


@pytest.mark.parametrize("arguments", [[], ["--nodes", "4"]], ids=["one machine", "four machines"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_of_a_recipe_is_one_that_its_script_takes(recipe, arguments):
    printed = subprocess.run(["bash", ROOT / "runs" / f"{recipe}.sh", "--print", *arguments], capture_output=True,
                             text=True, check=True).stdout
    scripts = []
    for words in map(shlex.split, printed.splitlines()):
        [place] = [place for place, word in enumerate(words) if word in OPTIONS]
        scripts.append(words[place])
        assert words[0] == ("torchrun" if words[place].startswith("train") and len(words[:place]) > 1 else "python")
        config.parse(OPTIONS[words[place]], "", words[place + 1:])
    assert list(dict.fromkeys(scripts)) == list(OPTIONS)  # data, cold start, RL, evaluation


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_rl_has_the_published_hyper_parameters(recipe):
    printed = subprocess.run(["bash", ROOT / "runs" / f"{recipe}.sh", "--print"], capture_output=True, text=True,
                             check=True).stdout
    [line] = [line for line in printed.splitlines() if "train_rl.py" in line]
    options = config.parse(TrainOptions, "", line.split("train_rl.py")[1].split())
    assert (options.samples, options.branches, options.lr, options.temperature) == (16, 16, 1e-6, 1.0)
    assert (options.clip_low, options.clip_high, options.dual_clip, options.nll_weight) == (0.2, 0.28, 3.0, 0.01)
    assert (options.suffix_tokens, options.max_code_rounds, options.min_group_fraction) == (100, 5, 0.5)
    assert options.problems_per_round == 128 * options.updates_per_round


def test_a_round_is_bound_by_memory_in_sampling_and_by_the_network_in_training_on_many_gpus():
    shape, options = plan.SHAPES["Qwen2.5-Math-7B"], RoundOptions(model="")
    one = plan_round.decode_step(shape, options, 1, 0)
    assert one == pytest.approx(2 * plan.num_parameters(shape) / (3.35e12 * 0.5))
    few, many = (plan_round.columns(shape, options, gpus) for gpus in (8, 1024))
    assert few["training: traffic of FSDP, s"] < few["training: arithmetic, s"]
    assert many["training: traffic of HSDP, s"] < many["training: arithmetic, s"] < many["training: traffic of FSDP, s"]
    assert many["GPU hours a round"] > few["GPU hours a round"]


def test_a_forward_takes_the_flops_that_torch_counts():
    """Matrix products of the model on fake tensors; attention apart, of which the counter sees all and not half."""
    shape = replace(plan.SHAPES["Qwen3-1.7B"], num_layers=2)
    pack = make_batch(1024, shape.vocab_size)[0]
    with FakeTensorMode() as mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = VarlenDecoder(shape)
        model.logits(model(mode.from_tensor(pack.token_ids), mode.from_tensor(pack.positions), None))
    assert counter.get_total_flops() == pytest.approx(plan_round.forward_flops(shape, 1024, 0), rel=1e-3)
