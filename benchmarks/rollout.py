"""Multi-round tool rollouts on a CPU: our engine against transformers' `generate` called once a round on re-encoded text.

    python benchmarks/rollout.py --model models/SmolLM2-135M-Instruct

Both sides sample at temperature 1 the same numbers of tokens from the same prompts and are given the same observations,
in the same dtype with the same threads, one after the other in one process, repeated and interleaved. What is compared
is sampled tokens per CPU second. The third row asks whether tool calls overlap with decoding: the wall time of 32
trajectories with a tool that sleeps a second, over that with an instant tool plus a second for each round.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.config import option  # noqa: E402
from thor.engine import Engine  # noqa: E402
from thor.sampling import Sampling, noise_key  # noqa: E402
from thor.weights import load_model  # noqa: E402

OBSERVATION = "\n```output\nThe result of this computation is 391 and it was checked.\n```\n"
FILLER = "A farmer counts 17 rows of 23 trees, sells a third of the fruit and asks what is left of it. "


@dataclass
class Options:
    """One flag a field."""

    model: str = option("models/SmolLM2-135M-Instruct", "Hugging Face directory")
    threads: int = option(1, "CPU threads of both sides")
    repeats: int = option(2, "times that each side runs, interleaved")
    scale: float = option(1.0, "share of the full token counts, for a quick look")


@dataclass(frozen=True)
class Case:
    """`groups` prompts of `prompt_tokens`, `samples` rollouts of each; lengths_RN are sampled tokens by round and rollout."""

    name: str
    prompt_tokens: int
    groups: int
    samples: int
    lengths_RN: list[list[int]]


def main(options: Options) -> None:
    """Run the three rows and print them."""
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    peer = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ours = load_model(options.model)
    rng = random.Random(0)
    tokens = max(4, int(48 * options.scale))
    cases = [Case("2 rounds, 60-token prompts, equal lengths", 60, 16, 1, [[tokens] * 16] * 2),
             Case("5 rounds, 300-token prompts, groups of 8, mixed lengths", 300, 4, 8,
                  [[rng.randint(tokens // 6, tokens) for _ in range(32)] for _ in range(5)])]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} thread(s), float32")
    for case in cases:
        compare(case, options.repeats, ours, peer, tokenizer)
    overlap(ours, tokenizer, tokens)


def compare(case: Case, repeats: int, ours: torch.nn.Module, peer: PreTrainedModel,
            tokenizer: PreTrainedTokenizerBase) -> None:
    """Interleave both sides and print sampled tokens per CPU second and their ratio."""
    prompts = make_prompts(case, tokenizer)
    seconds = {"ours": 0.0, "transformers": 0.0}
    for _ in range(repeats):
        for name, side in (("ours", lambda: run_ours(case, prompts, ours, tokenizer)),
                           ("transformers", lambda: run_peer(case, prompts, peer, tokenizer))):
            start = time.process_time()
            side()
            seconds[name] += time.process_time() - start
    tokens = repeats * sum(map(sum, case.lengths_RN))
    rate = {name: tokens / spent for name, spent in seconds.items()}
    print(f"{case.name}: ours {rate['ours']:.1f}, transformers {rate['transformers']:.1f} sampled tokens per CPU second, "
          f"ratio {rate['ours'] / rate['transformers']:.2f}", flush=True)


def make_prompts(case: Case, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """One prompt a group, of exactly `prompt_tokens` ids, all different from the first token on."""
    texts = [f"{number}. " + FILLER * (case.prompt_tokens // 8) for number in range(case.groups)]
    return [tokenizer.encode(text, add_special_tokens=False)[:case.prompt_tokens] for text in texts]


async def no_tool() -> None:
    """A tool that answers at once."""


async def roll(engine: Engine, case: Case, prompts: list[list[int]], observation: list[int],
               tool: Callable[[], Awaitable[None]]) -> None:
    """Every rollout of the case: sample, call the tool, append the observation, round after round."""
    firsts = [engine.new(ids, noise_key(group, 0)) for group, ids in enumerate(prompts)]
    ready = [asyncio.create_task(engine.prefill(first)) for first in firsts]

    async def one(number: int) -> None:
        group, sample = divmod(number, case.samples)
        await ready[group]
        sequence = engine.fork(firsts[group], noise_key(group, sample))
        for lengths_N in case.lengths_RN:
            await engine.sample(sequence, Sampling(1.0), lengths_N[number])
            await tool()
            engine.append(sequence, observation)
        engine.free(sequence)

    await asyncio.gather(*map(one, range(case.groups * case.samples)))


def run_ours(case: Case, prompts: list[list[int]], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase,
             tool: Callable[[], Awaitable[None]] = no_tool) -> None:
    """Our side: one engine with room for all, no EOS, so that lengths are as asked for."""
    observation = tokenizer.encode(OBSERVATION, add_special_tokens=False)
    longest = case.prompt_tokens + sum(map(max, case.lengths_RN)) + len(case.lengths_RN) * len(observation)
    engine = Engine(model, set(), case.groups * (case.samples + 1), longest)
    asyncio.run(roll(engine, case, prompts, observation, tool))


def run_peer(case: Case, prompts: list[list[int]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The usual way: a left-padded batch a round, generated to the longest row, decoded, extended, encoded again."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    texts = [tokenizer.decode(ids) for ids in prompts for _ in range(case.samples)]
    for lengths_N in case.lengths_RN:
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        longest = max(lengths_N)
        out = model.generate(**batch, max_new_tokens=longest, min_new_tokens=longest, do_sample=True, temperature=1.0,
                             top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id)
        fresh = out[:, batch["input_ids"].shape[1]:]
        texts = [text + tokenizer.decode(row[:length]) + OBSERVATION
                 for text, row, length in zip(texts, fresh, lengths_N, strict=True)]


def overlap(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """Wall time of 32 trajectories with a sleeping tool over (the same with an instant one + 1 s a round)."""
    rng = random.Random(1)
    case = Case("overlap", 60, 32, 1, [[rng.randint(tokens // 2, tokens) for _ in range(32)] for _ in range(3)])
    prompts = make_prompts(case, tokenizer)

    async def second() -> None:
        await asyncio.sleep(1.0)

    wall = []
    for tool in (no_tool, second):
        start = time.perf_counter()
        run_ours(case, prompts, model, tokenizer, tool)
        wall.append(time.perf_counter() - start)
    rounds = len(case.lengths_RN)
    print(f"32 trajectories, {rounds} rounds, a tool that sleeps 1 s: {wall[1]:.1f} s; instant tool + {rounds} s: "
          f"{wall[0] + rounds:.1f} s, ratio {wall[1] / (wall[0] + rounds):.2f}")


if __name__ == "__main__":
    config.run(main, Options, __doc__)
