"""The decoder against transformers' own models, and its indifference to how sequences are packed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from thor.attention import packed
from thor.model import Decoder, ModelConfig, compile_layers
from thor.weights import load_model


def logits_of(model: Decoder, sequences: list[list[int]]) -> torch.Tensor:
    """Logits [T, V] of the sequences, one after another in one stream."""
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.tensor([position for sequence in sequences for position in range(len(sequence))])
    return model.logits(model(ids, positions, packed([len(sequence) for sequence in sequences])))


def some_sequences(lengths: list[int], vocab_size: int = 131) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def test_float32_logits_equal_transformers(random_directory):
    [ids] = some_sequences([150])  # past the original context of the llama3 rope
    theirs = AutoModelForCausalLM.from_pretrained(random_directory, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(load_model(random_directory), [ids]), theirs, atol=1e-4, rtol=0)


def test_gradients_equal_transformers(random_directory):
    [ids] = some_sequences([40])
    theirs = AutoModelForCausalLM.from_pretrained(random_directory, dtype=torch.float32)
    ours = load_model(random_directory)
    theirs(torch.tensor([ids])).logits.log_softmax(-1)[0, :, 5].sum().backward()
    logits_of(ours, [ids]).log_softmax(-1)[:, 5].sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_packed_sequences_do_not_see_one_another(random_directory):
    model, sequences = load_model(random_directory), some_sequences([17, 1, 40, 8])
    alone = torch.cat([logits_of(model, [sequence]) for sequence in sequences])
    torch.testing.assert_close(logits_of(model, sequences), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_token_does_not_see_what_comes_after_it(random_directory):
    model, [ids] = load_model(random_directory), some_sequences([30])
    torch.testing.assert_close(logits_of(model, [ids])[:20], logits_of(model, [ids[:20]]), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_are_float32_or_better_whatever_the_weights_are(random_directories, dtype):
    [ids] = some_sequences([30])
    exact = logits_of(load_model(random_directories["qwen3"]), [ids])
    other = logits_of(load_model(random_directories["qwen3"], dtype), [ids])
    assert other.dtype == torch.promote_types(dtype, torch.float32)
    error = (other.log_softmax(-1) - exact.log_softmax(-1)).abs().mean()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


CUDA = pytest.param("cuda", marks=[pytest.mark.cuda,
                                   pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_low_precision_weights_are_not_rounded_and_have_the_gradients_of_a_linear_layer(device, tied):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(300, 64, 32, 1, 2, 1, 32, 1e-6, 1e4, 64, tied_head=tied)).bfloat16().to(device)
    hidden = (4 * torch.randn(7, 64)).bfloat16().to(device).requires_grad_()
    pull = torch.randn(7, 300, device=device)
    logits, head = model.logits(hidden), model.head_weight
    found = torch.autograd.grad((logits * pull).sum(), (hidden, head))
    rounded = torch.nn.functional.linear(hidden, head)
    torch.testing.assert_close(logits, hidden.float() @ head.float().T, rtol=1e-5, atol=1e-5)
    assert (logits - rounded.float()).abs().max() > 1e-3, "a bfloat16 product is further off"
    for ours, theirs in zip(found, torch.autograd.grad((rounded.float() * pull).sum(), (hidden, head)), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs)


def gradients_of(model: Decoder, ids: list[int]) -> list[torch.Tensor]:
    model.zero_grad()
    logits_of(model, [ids]).log_softmax(-1)[:, 5].sum().backward()
    return [parameter.grad for parameter in model.parameters()]


class CountingLayers:
    """How often any layer of a model is computed."""

    def __init__(self, model: Decoder):
        self.forwards = 0
        for layer in model.model["layers"]:
            layer.register_forward_pre_hook(self)

    def __call__(self, layer: torch.nn.Module, inputs: tuple) -> None:
        self.forwards += 1


def test_layers_computed_again_give_the_same_gradients_to_the_bit(random_directories):
    model, [ids] = load_model(random_directories["qwen3"]), some_sequences([40])
    kept = gradients_of(model, ids)
    counting, model.checkpoint_layers = CountingLayers(model), True
    for again, grad in zip(gradients_of(model, ids), kept, strict=True):
        assert torch.equal(again, grad)
    assert counting.forwards == 2 * model.config.num_layers
    with torch.no_grad():
        logits_of(model, [ids])
    assert counting.forwards == 3 * model.config.num_layers, "without gradients nothing is computed twice"


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients(random_directories):
    model, [ids, longer] = load_model(random_directories["qwen3"]), some_sequences([40, 57])
    plain = [gradients_of(model, some) for some in (ids, longer)]
    names = [name for name, _ in model.named_parameters()]
    compile_layers(model)
    assert [name for name, _ in model.named_parameters()] == names, "a compiled model is still the checkpoint's"
    for some, expected in zip((ids, longer), plain, strict=True):
        for found, grad in zip(gradients_of(model, some), expected, strict=True):
            torch.testing.assert_close(found, grad, atol=1e-4, rtol=1e-4)
