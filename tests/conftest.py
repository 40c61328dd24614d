"""Fixtures shared by the test files: a tiny trained model, random models of every type, one thread."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config
from transformers import Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

import thor.attention  # noqa: E402, F401  (before the first matrix product: it chooses how MKL computes)
import tiny  # noqa: E402

torch.set_num_threads(1)  # the models are tiny; tests of the number of threads, and of a real model, set their own

SIZES = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
         "max_position_embeddings": 256}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5000.0}

RANDOM_MODELS = {
    "llama": LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2,
                                          rope_parameters=DEFAULT_ROPE, tie_word_embeddings=False)),
    "llama-tied": LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4,
                                               rope_parameters=DEFAULT_ROPE, tie_word_embeddings=True)),
    "llama-llama3-rope": LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1,
                                                      rope_parameters=LLAMA3_ROPE)),
    "llama-biases": LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=3, num_key_value_heads=3,
                                                 rope_parameters=DEFAULT_ROPE, attention_bias=True)),
    "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=6, num_key_value_heads=2,
                                          rope_parameters=DEFAULT_ROPE)),
    "qwen2-tied": Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2,
                                               rope_parameters=DEFAULT_ROPE, tie_word_embeddings=True)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=20,
                                          rope_parameters=DEFAULT_ROPE)),
    "qwen3-tied": Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=7, num_key_value_heads=1, head_dim=16,
                                               rope_parameters=DEFAULT_ROPE, tie_word_embeddings=True)),
}


def randomise(model: PreTrainedModel) -> None:
    """Make every parameter count: biases not 0, norms not 1, logits of a spread that sampling can tell apart."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.data = 1.5 * noise / parameter.shape[1] ** 0.5
        else:
            parameter.data = 0.5 * noise + (1.0 if "norm" in name else 0.0)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> Path:
    """A Hugging Face directory of the tiny model that thinks, runs code and often fails (tests/tiny.py)."""
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def thinking_directory(tmp_path_factory) -> Path:
    """Its twin in the reasoning style: a Qwen3 with a chat template, whose code stands inside <think>."""
    return tiny.make_model(tmp_path_factory.mktemp("thinking"), thinking=True)


@pytest.fixture(scope="session")
def random_directories(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face directories of random models, one of each kind that we support, written by transformers."""
    directories = {}
    for name, model in RANDOM_MODELS.items():
        randomise(model)
        directories[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(directories[name])
    return directories


@pytest.fixture(params=RANDOM_MODELS)
def random_directory(request, random_directories) -> Path:
    """Each of the random models in turn."""
    return random_directories[request.param]
