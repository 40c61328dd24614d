"""A tiny world for the tests: a word-level tokenizer and a model trained for seconds to think, run code, and often fail.

The model is a real one (a Llama directory that transformers wrote), small enough that whole rollouts take milliseconds;
it adds two digits with a Python block, and about every third block uses a name that does not exist.
"""

import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thor.template import Template, encode_response

WORDS = ["```python", "```output", "```", "print(", "Problem:", "Solution:", "Add", "Again", "NameError", "name", "is",
         "not", "defined", "\\boxed{", "\n"] + [chr(code) for code in range(32, 127)]
CHAT = ("{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Solution:\n{% endif %}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, else single characters; decoding joins them as they are."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    pattern = "|".join(["```python", "```output", "```", r"print\(", "Problem:", "Solution:", "Add", "Again", "NameError",
                        "name", "is", "not", "defined", r"\\boxed\{", ".", "\n"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT)


def write_solution(rng: random.Random) -> tuple[str, str, str]:
    """(question, answer, response); in every third response the first block fails and a second one makes it good."""
    a, b = rng.randrange(10), rng.randrange(10)
    good = f"```python\nprint({a}+{b})\n```\n```output\n{a + b}\n```\n\\boxed{{{a + b}}}"
    bad = f"```python\nprint({a}+x)\n```\n```output\nNameError: name 'x' is not defined\n```\nAgain.\n"
    return f"{a}+{b}", str(a + b), "Add.\n" + (bad if rng.random() < 0.33 else "") + good


def make_model(directory: Path, steps: int = 300) -> Path:
    """Train and save the model; returns its Hugging Face directory."""
    rng = random.Random(0)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    template = Template(tokenizer, style="base", instruction="")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        rows = []
        for _ in range(24):
            question, _, response = write_solution(rng)
            rows.append(template.prompt_ids(question) + encode_response(template, response)[0])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -100)
        model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
