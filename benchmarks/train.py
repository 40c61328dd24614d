"""Training on packs against training on padded batches, on a CPU: time and peak memory of forward and backward.

    python benchmarks/train.py

Ours packs sequences without padding and scores only trained tokens, chunk by chunk. The other side is transformers' model on
the same sequences, padded to the longest, with full float32 logits, as most training loops have it. Both compute the mean
negative log-likelihood of the same tokens and its gradient; the two losses are compared before anything is timed. Each
measurement runs in a process of its own, for its peak memory; the sides take turns.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.batch import Sample, make_pack, score  # noqa: E402
from thor.config import option  # noqa: E402
from thor.weights import load_model  # noqa: E402


@dataclass
class Options:
    """One flag a field."""

    sequences: int = option(8, "sequences of a batch, evenly from 50 to 400 tokens long, the first quarter of each a prompt")
    vocabulary: int = option(49152, "entries of the vocabulary, SmolLM2's by default")
    repeats: int = option(3, "measurements of each side, interleaved")
    threads: int = option(1, "CPU threads")
    side: str | None = option(None, "used by the script itself: measure one side and print JSON")
    model: str | None = option(None, "used by the script itself: the model's directory")


def main(options: Options) -> None:
    """Measure both sides in turn and print the ratios."""
    if options.side is not None:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), options.vocabulary)
        found = {side: [run_side(side, directory, options) for _ in range(options.repeats)] for side in ("packed", "padded")}
    losses = {side: runs[0]["loss"] for side, runs in found.items()}
    assert abs(losses["packed"] - losses["padded"]) < 1e-4, f"the two sides compute different losses: {losses}"
    seconds, memory = ({side: min(run[name] for run in runs) for side, runs in found.items()} for name in ("seconds", "peak"))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} thread(s), float32, "
          f"{options.sequences} sequences")
    print(f"CPU time: packed {seconds['packed']:.2f} s, padded {seconds['padded']:.2f} s, "
          f"{seconds['padded'] / seconds['packed']:.2f} times faster")
    print(f"peak memory above the model's: packed {memory['packed']:.0f} MB, padded {memory['padded']:.0f} MB, "
          f"{memory['packed'] / memory['padded']:.2f} of it")


def write_model(directory: Path, vocabulary: int) -> None:
    """A random Llama in the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True)
    LlamaForCausalLM(shape).save_pretrained(directory)


def run_side(side: str, directory: str, options: Options) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--model", directory, "--sequences", str(options.sequences),
               "--vocabulary", str(options.vocabulary), "--threads", str(options.threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(options: Options) -> dict[str, float]:
    """CPU seconds of one forward and backward pass after a first one, peak memory above the model's in MB, and the loss."""
    torch.set_num_threads(options.threads)
    rng = random.Random(0)
    lengths = torch.linspace(50, 400, options.sequences).int().tolist()
    sequences = [[rng.randrange(options.vocabulary) for _ in range(length)] for length in lengths]
    step = packed_step(options, sequences) if options.side == "packed" else padded_step(options, sequences)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = step()
    started = time.process_time()
    step()
    seconds = time.process_time() - started
    return {"seconds": seconds, "peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "loss": loss}


def packed_step(options: Options, sequences: list[list[int]]):
    """Ours: one pack, trained tokens scored in chunks."""
    model = load_model(options.model)
    pack = make_pack([Sample(ids, [place >= len(ids) // 4 for place in range(len(ids))], []) for ids in sequences])

    def step() -> float:
        model.zero_grad()
        loss = -score(model, pack)[0].mean()
        loss.backward()
        return loss.item()

    return step


def padded_step(options: Options, sequences: list[list[int]]):
    """The usual way: padded to the longest, labels of -100 on prompts and padding."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    longest = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences])
    labels = torch.tensor([[-100] * (len(row) // 4) + row[len(row) // 4:] + [-100] * (longest - len(row)) for row in sequences])

    def step() -> float:
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.item()

    return step


if __name__ == "__main__":
    config.run(main, Options, __doc__)
