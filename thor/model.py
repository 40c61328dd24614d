"""One decoder for Llama, Qwen2/2.5 and Qwen3, over a packed stream of tokens.

The model knows nothing of batches, padding or caches: it sees T tokens with their positions and asks
`attend(layer, q, k, v)` to mix them, which is packed attention in training and cached attention in sampling.
Parameters carry the checkpoint's names, so `state_dict()` is the Hugging Face file as it stands.

T packed tokens · E hidden size · F feed-forward size · H query heads · K key/value heads · D head dim · V vocabulary
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# attend(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1: wavelengths beyond the original context are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in our words; `weights.read_config` makes it from a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_context: int
    llama3_rope: Llama3Rope | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False


class RMSNorm(nn.Module):
    """x / rms(x) in float32 (float64 stays), then scaled in the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; who attends to whom is the caller's `attend`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, H, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(mixed.flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The language model. `model(token_ids, positions, attend)` gives hidden states, `model.logits` the head.

    `checkpoint_layers`: while training, keep each layer's input only and compute the rest again in the backward pass.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_layers = config, False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers)),
            "norm": RMSNorm(config.hidden_size, config.norm_eps),
        })
        if not config.tied_head:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, E] after the final norm. Positions count from 0 in each sequence of the stream."""
        x = self.model["embed_tokens"](token_ids_T)
        cos, sin = rope_tables(self.config, positions_T, x.dtype)
        again = self.checkpoint_layers and torch.is_grad_enabled()
        for layer in self.model["layers"]:
            x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False) if again else layer(x, cos, sin, attend)
        return self.model["norm"](x)

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Next-token logits [T, V] in float32 (float64 stays): the one place where logits get their precision.

        bfloat16 has eight bits: a logit between 16 and 32 rounded to it is off by up to 1/16, a log-prob as much.
        """
        if hidden_TE.dtype in (torch.bfloat16, torch.float16):
            return WideProduct.apply(hidden_TE, self.head_weight)
        return F.linear(hidden_TE, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """[V, E]: the output head, which is the embedding when the checkpoint ties them."""
        return self.model["embed_tokens"].weight if self.config.tied_head else self.lm_head.weight


class WideProduct(torch.autograd.Function):
    """x @ weight.T of 16-bit factors as float32, never rounded in between; x [T, E], weight [V, E], both get 16-bit
    gradients as from F.linear."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.device.type == "cpu":
            return F.linear(x.float(), weight.float())
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.t() @ x


def compile_layers(model: Decoder) -> None:
    """torch.compile of what fuses well, norms and feed-forward, in place; attention stays with its own kernels."""
    for layer in model.model["layers"]:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). On a CPU torch's own kernel rounds the last few elements of a tensor differently from the others,
    so a token's bits would depend on the size of its batch; while sampling it is therefore done in steps that do not.
    """
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.silu(x)
    return x / (1.0 + torch.exp(-x))


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout: dimension i turns with dimension i + D/2. x [T, heads, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_tables(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D], computed in float32 and given in `dtype`."""
    angles = positions_T.float()[:, None] * rope_frequencies(config, positions_T.device)  # [T, D/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


@functools.cache  # computed on the host, and a copy from there would wait for the device at every step
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each dimension pair, float32 [D/2], with Llama 3's stretching where configured."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = (1.0 / config.rope_theta**exponents).to(device)
    scaling = config.llama3_rope
    if scaling is None:
        return frequencies
    # 0 where a wavelength exceeds the original context / low factor (stretch), 1 where it is short (leave)
    turns = scaling.original_context * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor
