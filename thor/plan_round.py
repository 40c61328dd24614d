"""How long a round of RL would take, and what limits it, by calculation: the numbers of docs/scale.md.

    python -m thor.plan_round --model Qwen2.5-Math-7B

Every number follows from the shape of the model, the data sheet of a GPU, and the assumptions that are the options
below; none is measured. Invariant: an assumption is an option or a constant here, never a number inside a formula.

P parameters · T tokens · n GPUs
"""

from dataclasses import dataclass

from thor import config as command_line
from thor.config import option, required
from thor.model import ModelConfig
from thor.plan import FLOAT32, find_shape, kv_bytes, layer_parameters, num_parameters, root_parameters

BF16 = 2
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Device:
    """What data sheets say, dense bf16, bytes a second in one direction; a network port of 400 Gbit/s for each GPU."""

    flops: float
    bandwidth: float
    nvlink: float = 450e9
    network: float = 50e9


DEVICES = {"H100": Device(989e12, 3.35e12), "H200": Device(989e12, 4.8e12)}


@dataclass
class RoundOptions:
    """One flag a field; the defaults are the published round and our assumptions."""

    model: str = required("Hugging Face directory, or one of thor.plan's shapes")
    device: str = option("H100", "one of " + ", ".join(DEVICES))
    problems: int = option(5120, "problems of a round")
    samples: int = option(16, "trajectories of a problem, and branches of its one failed step")
    updates: int = option(40, "optimizer steps of a round")
    prompt: int = option(250, "tokens of a prompt")
    response: int = option(1200, "tokens of a trajectory, mean")
    longest: int = option(3200, "tokens of the longest trajectory")
    branch: int = option(250, "tokens of a branch, mean")
    slots: int = option(128, "sequences that one GPU samples at once")
    pack_tokens: int = option(16384, "tokens of one forward pass in training")
    mfu: float = option(0.35, "share of the peak that training reaches, with layers computed again")
    decode_share: float = option(0.5, "share of the memory bandwidth that decoding reaches")
    link_share: float = option(0.7, "share of a link's bandwidth that collectives reach")
    code_blocks: float = option(2.0, "executions of a trajectory; a branch has one")
    execution_ms: float = option(13.5, "CPU time of an execution (docs/results.md: 10 to 17 ms)")

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}")
        for name, value in vars(self).items():
            if name not in ("model", "device") and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


def decode_step(shape: ModelConfig, options: RoundOptions, batch: int, context: float) -> float:
    """Seconds in which each of `batch` sequences gets a token: weights and keys and values are read once."""
    device = DEVICES[options.device]
    read = BF16 * num_parameters(shape) + batch * context * kv_bytes(shape, BF16)
    flops = 2 * num_parameters(shape) * batch
    return max(read / (device.bandwidth * options.decode_share), flops / (device.flops * options.mfu))


def sampling_seconds(shape: ModelConfig, options: RoundOptions, gpus: int) -> dict[str, float]:
    """Seconds of sampling trajectories while all slots are busy, of waiting for the longest one alone, of branches."""
    each = options.problems * options.samples / gpus
    batch = max(1, min(options.slots, int(each)))
    busy = decode_step(shape, options, batch, options.prompt + options.response / 2)
    later = decode_step(shape, options, batch, options.prompt + options.response)
    alone = decode_step(shape, options, 1, options.longest)
    return {"trajectories": max(1, each / batch) * options.response * busy,
            "waiting for the longest": (options.longest - options.response) * alone,
            "branches": max(1, each / batch) * options.branch * later}


def forward_flops(shape: ModelConfig, tokens: float, length: float) -> float:
    """2 P for each token, without the embedding's look-up, and causal attention over half of a sequence of `length`."""
    matrices = num_parameters(shape) - (0 if shape.tied_head else shape.vocab_size * shape.hidden_size)
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * length
    return tokens * (2 * matrices + attention)


def round_tokens(options: RoundOptions) -> float:
    """Tokens that a round trains on or reads: trajectories and branches, with all before them; no filter."""
    trajectory, branch = options.prompt + options.response, options.prompt + options.response / 2 + options.branch
    return options.problems * options.samples * (trajectory + branch)


def training_seconds(shape: ModelConfig, options: RoundOptions, gpus: int) -> float:
    """Seconds of arithmetic: π_old's forward, and forward, forward again and backward (twice a forward)."""
    flops = 5 * forward_flops(shape, round_tokens(options), options.prompt + options.response)
    return flops / (gpus * DEVICES[options.device].flops * options.mfu)


def pass_bytes(shape: ModelConfig, shards: int) -> float:
    """Bytes that a rank receives in one forward and backward pass: layers twice and the rest once in bf16, then
    gradients in float32, each less the rank's own share."""
    layers = shape.num_layers * layer_parameters(shape)
    received = BF16 * (2 * layers + root_parameters(shape)) + FLOAT32 * num_parameters(shape)
    return received * (shards - 1) / shards


def communication_seconds(shape: ModelConfig, options: RoundOptions, gpus: int, hsdp: bool) -> float:
    """Seconds in which the round's passes move weights and gradients. With HSDP weights are shared inside a node, and
    each pass ends with a sum of the gradients' shards over the nodes."""
    device = DEVICES[options.device]
    tokens = round_tokens(options) / (options.updates * gpus)
    passes = options.updates * max(1, -(-tokens // options.pack_tokens))
    shards = min(gpus, GPUS_OF_A_NODE) if hsdp else gpus
    link = device.nvlink if shards <= GPUS_OF_A_NODE else device.network
    seconds = pass_bytes(shape, shards) / link
    if hsdp and gpus > shards:
        seconds += 2 * FLOAT32 * num_parameters(shape) / shards / device.network
    return passes * seconds / options.link_share


def sync_seconds(shape: ModelConfig, options: RoundOptions, gpus: int) -> float:
    """Seconds in which every rank receives all float32 weights once, for its sampler; one GPU samples from its own."""
    if gpus == 1:
        return 0.0
    device = DEVICES[options.device]
    link = device.nvlink if gpus <= GPUS_OF_A_NODE else device.network
    return FLOAT32 * num_parameters(shape) / (link * options.link_share)


def sandbox_cores(options: RoundOptions, gpus: int, seconds: float) -> float:
    """Cores for each GPU that keep up with sampling which takes `seconds`."""
    executions = options.problems * options.samples * (options.code_blocks + 1)
    return executions * options.execution_ms / 1000 / (gpus * seconds)


def columns(shape: ModelConfig, options: RoundOptions, gpus: int) -> dict[str, float]:
    """Every number of one column of the table."""
    sampling = sampling_seconds(shape, options, gpus)
    arithmetic = training_seconds(shape, options, gpus)
    sharded, hybrid = (communication_seconds(shape, options, gpus, hsdp) for hsdp in (False, True))
    total = sum(sampling.values()) + sync_seconds(shape, options, gpus) + max(arithmetic, min(sharded, hybrid))
    return {"trajectories a GPU": options.problems * options.samples / gpus,
            **{f"sampling: {name}, s": seconds for name, seconds in sampling.items()},
            "weights to the samplers, s": sync_seconds(shape, options, gpus),
            "training: arithmetic, s": arithmetic,
            "training: traffic of FSDP, s": sharded,
            "training: traffic of HSDP, s": hybrid,
            "round, the better of the two, s": total,
            "GPU hours a round": total * gpus / 3600,
            "tokens of a rank and update": round_tokens(options) / options.updates / gpus,
            "sandbox cores a GPU": sandbox_cores(options, gpus, sum(sampling.values()))}


def show(options: RoundOptions) -> None:
    """Print the table for 8 to 1,024 GPUs."""
    shape, numbers = find_shape(options.model), (1, 8, 32, 64, 256, 1024)
    table = [columns(shape, options, gpus) for gpus in numbers]
    head = " | ".join(f"{gpus:,} GPUs" for gpus in numbers)
    print(f"| {options.model}, {options.device}, calculated | {head} |")
    print("| --- |" + " ---: |" * len(numbers))
    for name in table[0]:
        cells = (f"{column[name]:,.0f}" if column[name] >= 20 else f"{column[name]:.2g}" for column in table)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    command_line.run(show, RoundOptions, __doc__)
