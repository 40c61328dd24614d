"""The sampler–trainer gap on text: how far the trainer's log-prob of a sampled token is from the one it was sampled with.

    python benchmarks/gap.py --model models/SmolLM2-135M-Instruct

Both have the same weights; they differ in the order of their sums, which matters the more the fewer bits they keep. The
sampler answers the questions at temperature 1; the trainer scores what it sampled, packed. Each arrangement is measured
against float32 as well: the log-probs that float32 weights give to the same tokens. Sampled texts differ between rows.
"""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.batch import Sample, make_pack, score  # noqa: E402
from thor.config import option  # noqa: E402
from thor.engine import Engine  # noqa: E402
from thor.model import Decoder  # noqa: E402
from thor.paged_engine import make_engine  # noqa: E402
from thor.sampling import Sampling, noise_key  # noqa: E402
from thor.template import TEXT_INSTRUCTION, load_template  # noqa: E402
from thor.weights import load_model  # noqa: E402

QUESTIONS = ["Tom has 3 apples and buys 4 bags of 5 apples each. How many apples does he have now?",
             "A train covers 60 miles in 45 minutes. What is its speed in miles per hour?",
             "Explain in a few sentences why the sky is blue.",
             "Write a Python function that returns the sum of a list of numbers.",
             "What are five European capitals, and on which rivers do they lie?",
             "What is the remainder when 7^100 is divided by 5?"]

ROUNDED = "logits rounded to bfloat16"


@dataclass
class Options:
    """One flag a field."""

    model: str = option("models/SmolLM2-135M-Instruct", "Hugging Face directory")
    samples: int = option(4, "answers to each of six questions")
    tokens: int = option(120, "tokens of an answer at most")
    device: str = option("cpu", "cpu or cuda")
    threads: int = option(1, "CPU threads of torch")


def main(options: Options) -> None:
    """Print one row an arrangement; the ratio is to the first."""
    torch.set_num_threads(options.threads)
    template = load_template(options.model, "chat", TEXT_INSTRUCTION, None, False)
    prompts = [template.prompt_ids(question) for question in QUESTIONS for _ in range(options.samples)]
    longest = max(map(len, prompts)) + options.tokens
    reference = load_model(options.model).to(options.device).requires_grad_(False)
    print(f"torch {torch.__version__}, {options.device}, {len(prompts)} answers of at most {options.tokens} tokens")
    print("| arrangement | tokens | mean gap | largest | ratio | mean distance from float32 |\n|---|--:|--:|--:|--:|--:|")
    first = None
    for name, dtype in [("bfloat16", torch.bfloat16), (ROUNDED, torch.bfloat16), ("float32", torch.float32)]:
        model = load_model(options.model, dtype).to(options.device).requires_grad_(False)
        if name == ROUNDED:
            round_logits(model)
        engine = make_engine(model, {template.tokenizer.eos_token_id}, len(prompts), longest)
        samples = sample(engine, prompts, options.tokens)
        sampled = torch.tensor([p for one in samples for p in one.sampler_logprobs], device=options.device)
        scored, exact = (scores(scorer, samples, options.device) for scorer in (model, reference))
        gap = (scored - sampled).abs()
        first = first or gap.mean().item()
        print(f"| {name} | {len(gap)} | {gap.mean():.2g} | {gap.max():.2g} | {gap.mean() / first:.2g} | "
              f"{(sampled - exact).abs().mean():.2g} |", flush=True)


def round_logits(model: Decoder) -> None:
    """Let the model's logits pass through bfloat16, as those of a linear layer with such weights do."""
    plain = model.logits
    model.logits = lambda hidden_TE: plain(hidden_TE).bfloat16().float()


def sample(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[Sample]:
    """At most `num_tokens` tokens after each prompt, at temperature 1."""
    async def all_at_once() -> None:
        await asyncio.gather(*(engine.sample(sequence, Sampling(), num_tokens) for sequence in sequences))

    sequences = [engine.new(prompt, noise_key(number)) for number, prompt in enumerate(prompts)]
    asyncio.run(all_at_once())
    return [Sample(sequence.ids, [p is not None for p in sequence.logprobs],
                   [p for p in sequence.logprobs if p is not None]) for sequence in sequences]


@torch.no_grad()
def scores(model: Decoder, samples: list[Sample], device: torch.device | str) -> Tensor:
    """The trainer's log-probs [S] of all sampled tokens."""
    return score(model, make_pack(samples, device))[0]


if __name__ == "__main__":
    config.run(main, Options, __doc__)
