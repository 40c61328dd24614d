"""The tool rollouts that gpu.py compares, and transformers' two ways of doing them.

Each trajectory samples a number of tokens, gets an observation, and goes on, four times over. `generate` runs a round
as one left-padded batch to the longest row. `generate_batch`, its continuous batching, takes one number of tokens for
all: it gets the round's mean, so that it samples as many in total and never waits for a long row.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from gpu_shapes import synchronize  # noqa: E402

from thor.model import ModelConfig  # noqa: E402

ROUNDS = 4
OBSERVATION_TOKENS = 30


@dataclass(frozen=True)
class Case:
    """One prompt a group, `samples` rollouts of each; lengths_RN are sampled tokens by round and rollout."""

    prompts: list[list[int]]
    samples: int
    lengths_RN: list[list[int]]
    observation: list[int]

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all rollouts."""
        return sum(map(sum, self.lengths_RN))

    @property
    def longest(self) -> int:
        """Tokens of a trajectory at most."""
        return len(self.prompts[0]) + sum(map(max, self.lengths_RN)) + len(self.lengths_RN) * len(self.observation)


def make_case(vocab_size: int, groups: int, samples: int, prompt: int, shortest: int, longest: int) -> Case:
    """The same case at every call."""
    rng = random.Random(0)
    lengths = [[rng.randint(shortest, longest) for _ in range(groups * samples)] for _ in range(ROUNDS)]
    prompts = [[rng.randrange(1, vocab_size) for _ in range(prompt)] for _ in range(groups)]
    return Case(prompts, samples, lengths, [rng.randrange(1, vocab_size) for _ in range(OBSERVATION_TOKENS)])


def transformers_model(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Their model in the same shape with their random weights, made where it will lie."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layout = Qwen2Config(vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
                         intermediate_size=shape.intermediate_size, num_hidden_layers=shape.num_layers,
                         num_attention_heads=shape.num_heads,
                         num_key_value_heads=shape.num_kv_heads, max_position_embeddings=shape.max_context,
                         tie_word_embeddings=shape.tied_head, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2ForCausalLM(layout).eval()
    finally:
        torch.set_default_dtype(before)


def generate(shape: ModelConfig, case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Seconds of all rounds by `generate`, after a short one that does not count."""
    from transformers import GenerationConfig

    # on Hopper torch prefers it, and it plans anew for every length, 30 ms of each token: the peer is to be at its best
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = transformers_model(shape, dtype, device)
    rows = [list(ids) for ids in case.prompts for _ in range(case.samples)]

    def one_round(rows: list[list[int]], count: int) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=True, temperature=1.0,
                                    top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()

    one_round(rows, 2)
    synchronize(device)
    started = time.perf_counter()
    for lengths_N in case.lengths_RN:
        fresh = one_round(rows, max(lengths_N))
        rows = [row + new[:length] + case.observation for row, new, length in zip(rows, fresh, lengths_N, strict=True)]
    synchronize(device)
    return {"seconds": time.perf_counter() - started, "tokens": case.num_tokens}


def generate_batch(shape: ModelConfig, case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Seconds of all rounds by continuous batching, after a short one that does not count, and the sampled tokens."""
    from transformers import GenerationConfig

    if device.type != "cuda":
        raise ValueError("continuous batching is measured on a GPU only")
    model = transformers_model(shape, dtype, device)
    rows, tokens = [list(ids) for ids in case.prompts for _ in range(case.samples)], 0

    def one_round(rows: list[list[int]], count: int) -> list[list[int]]:
        settings = GenerationConfig(max_new_tokens=count, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                    eos_token_id=-1, pad_token_id=0)
        # kept from round to round: to set it up and record its graphs anew is not what a round costs
        outputs = list(model.generate_batch(inputs=rows, generation_config=settings, persistent_manager=True).values())
        assert len(outputs) == len(rows), f"{len(outputs)} of {len(rows)} rows came back"
        return [list(output.generated_tokens) for output in outputs]

    one_round(rows, 2)
    synchronize(device)
    started = time.perf_counter()
    for lengths_N in case.lengths_RN:
        fresh = one_round(rows, round(sum(lengths_N) / len(lengths_N)))
        tokens += sum(map(len, fresh))
        rows = [row + new + case.observation for row, new in zip(rows, fresh, strict=True)]
    synchronize(device)
    seconds = time.perf_counter() - started
    model.destroy_cached_continuous_batching_manager()
    return {"seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
    print("these are rows of gpu.py: python benchmarks/gpu.py --rows generate,generate_batch")
