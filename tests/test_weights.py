"""Hugging Face directories: what transformers wrote we load, what we write it loads, and the rest we refuse."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import logits_of, some_sequences
from transformers import AutoModelForCausalLM

from thor.weights import load_model, save_model


@pytest.fixture
def copied(random_directories, tmp_path):
    """A copy of the random Llama that a test may damage."""
    return shutil.copytree(random_directories["llama"], tmp_path / "model")


def change_config(directory, changes, drop=()):
    config = json.loads((directory / "config.json").read_text())
    for name in drop:
        config.pop(name)
    (directory / "config.json").write_text(json.dumps(config | changes))


def change_tensors(directory, changes, drop=()):
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
    save_file(kept | changes, directory / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_what_we_save_transformers_loads_with_equal_logits(random_directory, tmp_path, max_shard_size):
    model, [ids] = load_model(random_directory), some_sequences([40])
    for parameter in model.parameters():
        parameter.mul_(1.1)
    save_model(model, tmp_path / "saved", random_directory, max_shard_size)
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file() == (max_shard_size == "20KB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], logits_of(model, [ids]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_we_save_we_load_bit_for_bit(random_directory, tmp_path):
    model = load_model(random_directory, torch.bfloat16)
    save_model(model, tmp_path, random_directory, "20KB")
    again = load_model(tmp_path, torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
def test_shards_that_transformers_wrote_are_one_model(random_directory, tmp_path):
    AutoModelForCausalLM.from_pretrained(random_directory).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    [ids] = some_sequences([20])
    assert torch.equal(logits_of(load_model(tmp_path), [ids]), logits_of(load_model(random_directory), [ids]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-llama3-rope"])
def test_old_configs_with_rope_theta_are_the_same_model(random_directories, tmp_path, name):
    old = shutil.copytree(random_directories[name], tmp_path / "old")
    rope = json.loads((old / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    change_config(old, {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}, ["rope_parameters"])
    [ids] = some_sequences([100])
    assert torch.equal(logits_of(load_model(old), [ids]), logits_of(load_model(random_directories[name]), [ids]))


def test_a_tied_head_stored_a_second_time_is_the_embedding(random_directories, tmp_path):
    directory = shutil.copytree(random_directories["llama-tied"], tmp_path / "model")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(directory, {"lm_head.weight": embedding})
    assert "lm_head.weight" not in load_model(directory).state_dict()


def test_loaded_weights_can_be_trained(random_directory):
    assert all(parameter.requires_grad for parameter in load_model(random_directory).parameters())


@pytest.mark.parametrize("changes, drop, message", [
    ({"model_type": "mistral"}, [], "model_type 'mistral' is not supported; it must be one of llama, qwen2, qwen3"),
    ({}, ["model_type"], "model_type None is not supported"),
    ({"use_sliding_window": True, "sliding_window": 64}, [], "use_sliding_window = True is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, [], "layer_types"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, [], "rope type 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}, ["rope_parameters"], "rope type 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}}, [], "lacks low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, [], "partial_rotary_factor"),
    ({}, ["rope_parameters"], "neither rope_parameters nor rope_theta"),
    ({"hidden_act": "gelu"}, [], "hidden_act = 'gelu'"),
    ({"mlp_bias": True}, [], "mlp_bias"),
    ({"quantization_config": {"quant_method": "awq"}}, [], "quantization_config"),
    ({}, ["hidden_size"], "config.json lacks hidden_size"),
])
def test_a_config_we_do_not_support_is_refused_in_one_sentence(copied, changes, drop, message):
    change_config(copied, changes, drop)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, drop, message", [
    ({}, ["model.norm.weight"], "no tensor model.norm.weight"),
    ({"model.extra.weight": torch.ones(3)}, [], "a tensor model.extra.weight that this architecture does not use"),
    ({"model.norm.weight": torch.ones(3)}, [], r"model.norm.weight has shape \[3\], expected \[48\]"),
])
def test_tensors_that_do_not_fit_the_config_are_refused(copied, changes, drop, message):
    change_tensors(copied, changes, drop)
    with pytest.raises(ValueError, match=message):
        load_model(copied)


def test_a_missing_shard_is_named(random_directories, tmp_path):
    AutoModelForCausalLM.from_pretrained(random_directories["llama"]).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"missing: {shard.name}"):
        load_model(tmp_path)


def test_a_directory_without_a_model_is_refused(copied, tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_model(tmp_path / "nowhere")
    (copied / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_model(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
        load_model(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_model(copied)
