"""What a run needs of each GPU's memory, by calculation, before it is started: what fits, and what would.

    python -m thor.plan --model Qwen2.5-Math-7B --gpus 8 --tokens 16384

MODEL is a Hugging Face directory or one of the shapes below. The numbers follow from what the code keeps: thor/model.py
without compilation, thor/batch.py's chunks, thor/parallel.py's sharding. Invariant: tests/test_plan.py holds every
formula against the bytes that the same code really holds, within 15 %. What CUDA itself takes (context, fragmentation,
buffers of NCCL) is in none of it: `--memory` should leave 5 to 10 % of the device.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from thor import config as command_line
from thor.batch import CHUNK_TOKENS
from thor.cache import KEY_BLOCK, round_up
from thor.config import option, required
from thor.model import ModelConfig
from thor.weights import read_config

GIB = 2**30
FLOAT32 = 4
LOGITS_BYTES = 20  # of a sampled token and word: logits, log-prob and probability in float32, float64 sum


def _shape(vocab: int, hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, tied: bool,
           qwen3: bool = False) -> ModelConfig:
    context, theta = (40960, 1e6) if qwen3 else (4096, 1e4)
    return ModelConfig(vocab, hidden, feed_forward, layers, heads, kv_heads, 128, 1e-6, theta, context,
                       qkv_bias=not qwen3, qk_norm=qwen3, tied_head=tied)


# From the published config.json of each.
SHAPES = {
    "Qwen2.5-Math-1.5B": _shape(151936, 1536, 8960, 28, 12, 2, tied=True),
    "Qwen2.5-Math-7B": _shape(152064, 3584, 18944, 28, 28, 4, tied=False),
    "Qwen3-1.7B": _shape(151936, 2048, 6144, 28, 16, 8, tied=True, qwen3=True),
    "Qwen3-4B": _shape(151936, 2560, 9728, 36, 32, 8, tied=True, qwen3=True),
    "Qwen3-8B": _shape(151936, 4096, 12288, 36, 32, 8, tied=False, qwen3=True),
}


@dataclass
class PlanOptions:
    """One flag a field."""

    model: str = required("Hugging Face directory, or one of " + ", ".join(SHAPES))
    gpus: int = option(8, "ranks, one a GPU")
    tokens: int = option(16384, "of the largest pack: --pack_tokens of train_rl.py, --micro_tokens of train_sft.py")
    memory: float = option(80.0, "GiB of a GPU that the run may use")
    dtype: str = option("bfloat16", "of the arithmetic and of the sampler: bfloat16 or float32; masters are float32")
    checkpoint_layers: bool = option(False, "keep each layer's input only, compute it again in the backward pass")
    offload: bool = option(False, "float32 weights, their gradients and AdamW's moments on the CPU")
    replicas: int = option(1, "groups of ranks that each hold all weights between them (HSDP)")
    slots: int = option(64, "sequences that are sampled at once; the cache holds twice as many")
    context: int = option(4608, "tokens of a sequence in the cache: prompt, response and a branch")
    attention: str = option("varlen", "of training. varlen: as on CUDA; sdpa: one sequence at a time, as on a CPU")

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens", "replicas", "slots", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.gpus % self.replicas:
            raise ValueError(f"replicas is {self.replicas}; it must divide the number of GPUs, which is {self.gpus}")
        if self.dtype not in ("bfloat16", "float32") or self.attention not in ("varlen", "sdpa"):
            raise ValueError(f"dtype must be bfloat16 or float32 and attention varlen or sdpa, got {self.dtype!r} and "
                             f"{self.attention!r}")

    @property
    def shards(self) -> int:
        """GPUs that hold all weights between them."""
        return self.gpus // self.replicas

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the arithmetic."""
        return 2 if self.dtype == "bfloat16" else FLOAT32


@dataclass(frozen=True)
class Row:
    """Bytes of one thing while sampling; while the head is in its backward pass, then the last layer, then, as it ends,
    the embedding; and in the optimizer step."""

    name: str
    sampling: float = 0
    head: float = 0
    layer: float = 0
    end: float = 0
    update: float = 0


PHASES = ("sampling", "head", "layer", "end", "update")


def layer_parameters(shape: ModelConfig) -> int:
    """Parameters of one layer."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (2 * heads + 2 * kv)
    biases = shape.qkv_bias * (heads + 2 * kv) + shape.o_bias * shape.hidden_size
    norms = 2 * shape.hidden_size + shape.qk_norm * 2 * shape.head_dim
    return attention + biases + norms + 3 * shape.hidden_size * shape.intermediate_size


def root_parameters(shape: ModelConfig) -> int:
    """Parameters outside the layers: embedding, head if it is one of its own, last norm."""
    return (2 - shape.tied_head) * shape.vocab_size * shape.hidden_size + shape.hidden_size


def num_parameters(shape: ModelConfig) -> int:
    """P."""
    return shape.num_layers * layer_parameters(shape) + root_parameters(shape)


def saved_by_layer(shape: ModelConfig, c: int, attention: str) -> int:
    """Bytes that one layer keeps of one token for its backward pass, with `c` bytes a number.

    A norm keeps its input in float32, the normalised input and its output; attention q, k, v, its output and the
    float32 log-sum of each head; the feed-forward gate, silu(gate), up, and their product. Attention one sequence at a
    time keeps its output twice: as it came, and joined with the others'.
    """
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = 2 * ((FLOAT32 + 2 * c) * shape.hidden_size + FLOAT32)
    qk_norms = (FLOAT32 + c) * (heads + kv) + FLOAT32 * (shape.num_heads + shape.num_kv_heads) if shape.qk_norm else 0
    mixed = c * (heads + 2 * kv) + c * heads * (2 if attention == "sdpa" else 1) + FLOAT32 * shape.num_heads
    return norms + qk_norms + mixed + 4 * c * shape.intermediate_size


def saved_outside_layers(shape: ModelConfig, c: int) -> int:
    """Bytes kept of one token by rotary tables, last norm, and the rows that the head reads (all tokens trained)."""
    return 2 * c * shape.head_dim + (FLOAT32 + 2 * c) * shape.hidden_size


def activations(shape: ModelConfig, options: PlanOptions) -> float:
    """Bytes that are kept of a whole pack when its backward pass begins: everything, or the inputs of layers."""
    c = options.compute_bytes
    layer = c * shape.hidden_size if options.checkpoint_layers else saved_by_layer(shape, c, options.attention)
    return options.tokens * (shape.num_layers * layer + saved_outside_layers(shape, c))


def head_temporaries(shape: ModelConfig, options: PlanOptions) -> float:
    """Bytes of the head's backward pass: a chunk's log-probs, their gradient and that of the logits, in float32 and in
    the dtype of the arithmetic; the gradient that the chunk gives the head's weight, and the sum it is added to."""
    c = options.compute_bytes
    wide = 3 * FLOAT32 + (c if c < FLOAT32 else 0)
    return min(CHUNK_TOKENS, options.tokens) * shape.vocab_size * wide + 2 * c * shape.vocab_size * shape.hidden_size


def layer_temporaries(shape: ModelConfig, options: PlanOptions) -> float:
    """Bytes of a layer's backward pass: gradients of two products of the feed-forward beside one weight's, and all that
    the layer keeps if it is computed again."""
    c = options.compute_bytes
    again = saved_by_layer(shape, c, options.attention) if options.checkpoint_layers else 0
    return options.tokens * (2 * c * shape.intermediate_size + again) + c * shape.hidden_size * shape.intermediate_size


def kv_bytes(shape: ModelConfig, c: int) -> int:
    """Bytes of keys and values of one token."""
    return 2 * c * shape.num_layers * shape.num_kv_heads * shape.head_dim


def memory(shape: ModelConfig, options: PlanOptions) -> list[Row]:
    """Everything that a rank of train_rl.py has in its GPU's memory."""
    c, share = options.compute_bytes, num_parameters(shape) / options.shards
    weights, moments = (0, 0) if options.offload else (FLOAT32 * share, 2 * FLOAT32 * share)
    copy = c * num_parameters(shape)
    cache = 2 * options.slots * round_up(options.context, KEY_BLOCK) * kv_bytes(shape, c)
    kept = activations(shape, options)
    return [
        Row(f"weights, float32, 1/{options.shards}", *[weights] * 5),
        Row(f"AdamW's two moments, float32, 1/{options.shards}", *[moments] * 5),
        Row(f"gradients, float32, 1/{options.shards}", 0, *[weights] * 4),
        Row(f"sampler's weights, {options.dtype}, whole", copy),
        Row(f"keys and values of {2 * options.slots} x {options.context} tokens", cache),
        Row(f"logits of {options.slots} tokens being drawn", options.slots * shape.vocab_size * LOGITS_BYTES),
        *whole_weights(shape, options),
        Row("activations" + ": inputs of layers" * options.checkpoint_layers, 0, kept, kept),
        Row("temporaries", 0, head_temporaries(shape, options), layer_temporaries(shape, options)),
    ]


def whole_weights(shape: ModelConfig, options: PlanOptions) -> Iterator[Row]:
    """What FSDP2 has unsharded. Embedding and head, from the forward pass on; with a layer being computed, the head's
    gradient, that layer and the next (fetched ahead), the layer's gradients and the float32 buffer that sums them over
    the ranks; as it ends, the gradients of embedding and head, and their buffer. One GPU does the same in bfloat16, and
    has its weights as they are in float32."""
    c, layer, root = options.compute_bytes, layer_parameters(shape), root_parameters(shape)
    if options.gpus == 1 and c == FLOAT32:
        return
    yield Row("embedding and head, whole", 0, c * root, c * root)
    yield Row("their gradients, whole", 0, 0, c * shape.vocab_size * shape.hidden_size, (c + FLOAT32) * root)
    yield Row("two layers whole, gradients of one", 0, 0, (3 * c + FLOAT32) * layer)


def totals(rows: list[Row]) -> dict[str, float]:
    """Bytes of each phase."""
    return {phase: sum(getattr(row, phase) for row in rows) for phase in PHASES}


def peak(shape: ModelConfig, options: PlanOptions) -> float:
    """The largest of the phases, in bytes."""
    return max(totals(memory(shape, options)).values())


def largest_pack(shape: ModelConfig, options: PlanOptions) -> int:
    """Tokens of the largest pack with which everything fits, in steps of 1,024; 0 if none does."""
    def fits(thousands: int) -> bool:
        return peak(shape, replace(options, tokens=1024 * thousands)) <= options.memory * GIB

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 1024 * low


def fewest_gpus(shape: ModelConfig, options: PlanOptions) -> int | None:
    """The smallest power of two of GPUs on which it fits, all of them sharing the weights; None if no number does."""
    for exponent in range(13):
        if peak(shape, replace(options, gpus=2**exponent, replicas=1)) <= options.memory * GIB:
            return 2**exponent
    return None


def find_shape(model: str) -> ModelConfig:
    """A named shape, or that of a Hugging Face directory. ValueError if it is neither."""
    if model in SHAPES:
        return SHAPES[model]
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model!r} is neither a directory with a config.json nor one of {', '.join(SHAPES)}")
    return read_config(model)


def verdict(shape: ModelConfig, options: PlanOptions) -> list[str]:
    """Whether it fits, and what would: other packs, layers computed again, masters and moments on the CPU, more GPUs."""
    biggest, tops = peak(shape, options), totals(memory(shape, options))
    if biggest <= options.memory * GIB:
        lines = [f"fits: {biggest / GIB:.1f} of {options.memory:g} GiB"]
    else:
        lines = [f"does not fit: {biggest / GIB:.1f} of {options.memory:g} GiB ({max(tops, key=tops.get)})"]
    for checkpointing in (False, True):
        for offload in (False, True):
            tokens = largest_pack(shape, replace(options, checkpoint_layers=checkpointing, offload=offload))
            lines.append(f"largest pack{', --checkpoint_layers' * checkpointing}{', --offload' * offload}: "
                         + (f"{tokens:,} tokens" if tokens else "none"))
    number = fewest_gpus(shape, options)
    lines.append(f"fewest GPUs for {options.tokens:,} tokens: " + (f"{number}" if number else "no number is enough"))
    if options.compute_bytes * num_parameters(shape) > options.memory * GIB / 2:
        lines.append("the sampler's weights take more than half of a GPU: sampling would have to be tensor-parallel")
    return lines


def table(shape: ModelConfig, options: PlanOptions) -> str:
    """GiB of each thing in each phase, and their sums."""
    rows = [row for row in memory(shape, options) if any(getattr(row, phase) for phase in PHASES)]
    width = max(len(row.name) for row in rows)

    def line(name: str, numbers: dict[str, float]) -> str:
        cells = (f"{numbers[phase] / GIB:10.2f}" if numbers[phase] else " " * 9 + "–" for phase in PHASES)
        return name.ljust(width) + "".join(cells)

    head = "GiB of each GPU".ljust(width) + "".join(f"{phase:>10}" for phase in PHASES)
    body = [line(row.name, {phase: getattr(row, phase) for phase in PHASES}) for row in rows]
    return "\n".join([head, *body, line("sum", totals(rows))])


def show(options: PlanOptions) -> None:
    """Print the table and what fits."""
    shape = find_shape(options.model)
    print(f"{options.model}: {num_parameters(shape) / 1e9:.2f} billion parameters, "
          f"{layer_parameters(shape) / 1e6:.1f} million in each of {shape.num_layers} layers; "
          f"{kv_bytes(shape, options.compute_bytes) / 1024:.0f} KiB of keys and values a token\n"
          f"GPUs: {options.gpus}, weights over {options.shards} of them; packs of {options.tokens:,} tokens")
    print(table(shape, options))
    print("\n".join(verdict(shape, options)))


def main(argv: list[str] | None = None) -> None:
    """The command line; `--plan MODEL` is `--model MODEL`, for `python -m thor.parallel --plan MODEL`."""
    argv = ["--model" if word == "--plan" else word for word in (sys.argv[1:] if argv is None else argv)]
    command_line.run(show, PlanOptions, __doc__, argv)


if __name__ == "__main__":
    main()
