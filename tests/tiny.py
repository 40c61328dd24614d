"""A tiny world for the tests: a word-level tokenizer and a model trained for seconds to think, run code, and often fail.

The model is a real one (a Llama directory that transformers wrote), small enough that whole rollouts take milliseconds;
it adds two digits with a Python block, and about every third block uses a name that does not exist. Its reasoning twin
is a Qwen3 with a chat template like Qwen3's, which does the same inside <think>.
"""

import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from thor.template import Template, encode_response

WORDS = ["```python", "```output", "```", "print(", "Problem:", "Solution:", "Add", "Again", "NameError", "name", "is",
         "not", "defined", "\\boxed{", "\n"] + [chr(code) for code in range(32, 127)]
CHAT = ("{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Solution:\n{% endif %}")
# As Qwen3's: the thoughts of earlier turns are left out, and where thinking is off the turn begins with an empty <think>.
QWEN3 = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
         "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n"
         "{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n"
         "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
# as those Qwen3 that always think: the prompt opens the <think>, whatever is asked
ALWAYS_THINKS = QWEN3.replace("<think>\n\n</think>\n\n{% endif %}", "{% endif %}<think>\n")


def make_tokenizer(thinking: bool = False) -> PreTrainedTokenizerFast:
    """Whole words, else single characters; decoding joins them as they are."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    pattern = "|".join(["```python", "```output", "```", r"print\(", "Problem:", "Solution:", "Add", "Again", "NameError",
                        "name", "is", "not", "defined", r"\\boxed\{", ".", "\n"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if thinking:
        tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
        tokenizer.add_tokens(["<think>", "</think>"])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=QWEN3)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT)


def make_template(thinking: bool = False) -> Template:
    """How the tiny model is asked."""
    return Template(make_tokenizer(thinking), "chat" if thinking else "base", instruction="", thinking=thinking)


def write_solution(rng: random.Random, thinking: bool = False) -> tuple[str, str, str]:
    """(question, answer, response); in every third response the first block fails and a second one makes it good."""
    a, b = rng.randrange(10), rng.randrange(10)
    good = f"```python\nprint({a}+{b})\n```\n```output\n{a + b}\n```\n"
    bad = f"```python\nprint({a}+x)\n```\n```output\nNameError: name 'x' is not defined\n```\nAgain.\n"
    thoughts, box = "Add.\n" + (bad if rng.random() < 0.33 else "") + good, f"\\boxed{{{a + b}}}"
    return f"{a}+{b}", str(a + b), f"<think>\n{thoughts}</think>\n\n{box}" if thinking else thoughts + box


def make_model(directory: Path, steps: int = 300, thinking: bool = False) -> Path:
    """Train and save the model; returns its Hugging Face directory."""
    rng = random.Random(0)
    torch.manual_seed(0)
    template = make_template(thinking)
    tokenizer = template.tokenizer
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                 eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **shape)) if thinking else LlamaForCausalLM(LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        rows = []
        for _ in range(24):
            question, _, response = write_solution(rng, thinking)
            rows.append(template.prompt_ids(question) + encode_response(template, response)[0])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -100)
        model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
