"""A Hugging Face directory <-> our model: config.json, safetensors (one file or sharded), tokenizer.

What we read and do not understand is an error, never a guess: a wrong rope base or a missing shard would give a model
that runs and is wrong. What we write, `AutoModelForCausalLM.from_pretrained` loads with equal logits.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thor.model import Decoder, Llama3Rope, ModelConfig

FAMILIES = ("llama", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}


def load_model(directory: str | Path, dtype: torch.dtype | None = torch.float32,
               device: str | torch.device = "cpu") -> Decoder:
    """The model of a Hugging Face directory, weights in `dtype` (None: that of the files, which stay mapped on a CPU).

    ValueError for what cannot be loaded exactly.
    """
    config = read_config(directory)
    with torch.device("meta"):
        model = Decoder(config)
    wanted = model.state_dict()
    tensors = {name: tensor.to(dtype) for name, tensor in _read_tensors(Path(directory)).items()}
    if config.tied_head:  # some checkpoints store the tied head a second time
        tensors.pop("lm_head.weight", None)
    _check_tensors(tensors, wanted, directory)
    model.load_state_dict(tensors, assign=True)
    return model.to(device)


def save_model(model: Decoder, directory: str | Path, config_directory: str | Path,
               max_shard_size: str = "5GB") -> None:
    """Write weights and config.json; the config is that of `config_directory` with the dtype of the weights."""
    save_tensors(model.state_dict(), directory, config_directory, max_shard_size)


def save_tensors(weights: dict[str, Tensor], directory: str | Path, config_directory: str | Path,
                 max_shard_size: str = "5GB") -> None:
    """The same for a model's parameters by name, all of one dtype."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config = _read_json(Path(config_directory) / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_torch_state_dict(tensors, target, max_shard_size=max_shard_size)


def read_config(directory: str | Path) -> ModelConfig:
    """config.json as our ModelConfig. Raises ValueError that names the architecture or feature we do not have."""
    raw = _read_json(Path(directory) / "config.json")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{directory}: model_type {family!r} is not supported; it must be "
                         f"one of {', '.join(FAMILIES)}")
    _refuse_unsupported(raw, directory)
    heads = raw["num_attention_heads"]
    theta, scaling = _read_rope(raw, directory)
    bias = family == "qwen2" or raw.get("attention_bias", False)
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_context=raw.get("max_position_embeddings") or (2048 if family == "llama" else 32768),
        llama3_rope=scaling,
        qkv_bias=bias,
        o_bias=bias and family != "qwen2",  # Qwen2 has biases on q, k and v only
        qk_norm=family == "qwen3",
        tied_head=raw.get("tie_word_embeddings", False),
    )


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a model is a Hugging Face directory with config.json and safetensors")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _refuse_unsupported(raw: dict, directory: str | Path) -> None:
    missing = [key for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                               "num_attention_heads") if key not in raw]
    if missing:
        raise ValueError(f"{directory}: config.json lacks {', '.join(missing)}")
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    unsupported = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "mlp_bias": raw.get("mlp_bias", False),
        "use_sliding_window": raw.get("use_sliding_window", False),
        "layer_types": layer_types != {"full_attention"},
        "quantization_config": raw.get("quantization_config") is not None,
    }
    for key, wrong in unsupported.items():
        if wrong:
            raise ValueError(f"{directory}: {key} = {raw[key]!r} is not supported")


def _read_rope(raw: dict, directory: str | Path) -> tuple[float, Llama3Rope | None]:
    """Rope base and scaling: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    theta = rope.get("rope_theta") or raw.get("rope_theta")
    if theta is None:
        raise ValueError(f"{directory}: config.json has neither rope_parameters nor rope_theta; guessing the base "
                         f"would give a wrong model")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ValueError(f"{directory}: partial_rotary_factor is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [name for name in names if name not in rope]
        if missing:
            raise ValueError(f"{directory}: the llama3 rope scaling lacks {', '.join(missing)}")
        return float(theta), Llama3Rope(*(rope[name] for name in names))
    raise ValueError(f"{directory}: rope type {kind!r} is not supported; it must be default or llama3")


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file():
        files = [directory / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    elif single.is_file():
        files = [single]
    else:
        raise ValueError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{directory}: the index names {len(files)} shards, missing: {', '.join(missing)}")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error})") from None
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor], directory: str | Path) -> None:
    for name in wanted.keys() - tensors.keys():
        raise ValueError(f"{directory}: the checkpoint has no tensor {name}")
    for name in tensors.keys() - wanted.keys():
        raise ValueError(f"{directory}: the checkpoint has a tensor {name} that this architecture does not use")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{directory}: {name} has shape {list(tensors[name].shape)}, "
                             f"expected {list(tensor.shape)}")
