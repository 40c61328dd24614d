"""Where code begins and ends, in sampled tokens and in written text, for several families of tokenizers."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from thor.template import (CLOSE_THINKING, FenceScanner, Template, code_of, cut_response, encode_response,
                           imitated_outputs, load_template, observation_text, shown, stop_ids)
from thor.trajectory import Execution, Span, loss_mask

CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")

OK = Execution("ok", "391\n", "", 0.0)
RESPONSE = "I multiply.\n\n```python\nprint(17 * 23)\n```\n```output\n391\n```\nSo it is \\boxed{391}."
CORPUS = [RESPONSE, "```python\nimport math\nprint(math.gcd(4, 6))\n```\n```output\n2\n```\n", "a)\n```\n\n", "x\n\n```python\n"]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT)


def byte_level(merge_lines: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE: words only, as SmolLM2 (fence and newline apart), or merges over newlines, as Qwen has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merge_lines)
    tokenizer.decoder = decoders.ByteLevel()
    size = 256 + (60 if merge_lines else 40)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    corpus = ["```python\n", "```\n", ")\n```\n", "\n\n```"] * 50 if merge_lines else CORPUS
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap(tokenizer)


def word_level() -> PreTrainedTokenizerFast:
    """Whole words, single characters for the rest, fences as single tokens: the kind the demo trains from scratch."""
    words = ["```python", "```output", "```", "print", "import", "\\boxed{"] + [chr(c) for c in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"```python|```output|```|print|import|\\boxed\{|.|\n"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrap(tokenizer)


FAMILIES = {"words": lambda: byte_level(False), "lines merged": lambda: byte_level(True), "word level": word_level}


@pytest.fixture(params=FAMILIES, scope="module")
def template(request) -> Template:
    return Template(FAMILIES[request.param](), style="chat")


def sample_like(template: Template, text: str) -> tuple[list[int], int | None]:
    """(tokens up to the one that closes the fence, act start) of `text` fed token by token, as a sampler would."""
    scanner = FenceScanner(template)
    ids = template.encode(text)
    for count, token in enumerate(ids, 1):
        if scanner.push(token):
            return ids[:count], scanner.act_start
    return ids, None


def test_the_families_split_fences_differently():
    """The other tests would prove little if all three tokenizers cut the same."""
    pieces = {name: [Template(make()).token_text(i) for i in make().encode(")\n```\n", add_special_tokens=False)]
              for name, make in FAMILIES.items()}
    assert pieces["words"][-1] == "\n" and pieces["lines merged"] == [")\n```\n"] and pieces["word level"][-2] == "```"


def test_act_runs_from_the_opening_fence_to_the_token_that_completes_the_closing_fence(template):
    ids, act_start = sample_like(template, RESPONSE)
    act = template.decode(ids[act_start:])
    assert act.lstrip("\n").startswith("```python\n") and act.rstrip("\n").endswith("\n```")
    assert not act[1:].startswith("\n\n"), "the act must not begin before the token with the first backtick"
    assert "`" not in template.decode(ids[:act_start]) and "`" in template.token_text(ids[act_start])
    assert "`" in template.token_text(ids[-1]), "sampling must stop on the token with the third backtick"
    assert code_of(act) == "print(17 * 23)\n"


@pytest.mark.parametrize("text", [
    "no code at all\n",
    "```python\nprint(1)\n",                       # never closed
    "```\nprint(1)\n```\n",                        # no language
    "```output\n4\n```\n",                         # the model imitates an observation
    " ```python\nprint(1)\n```\n",                 # the opening fence is not at the start of its line
    "the word python\nprint(1)\n```\n",
    "```python\nprint(1)```\nmore\n",              # glued to code
    "```python\nx = 'a ```'\n",
    "```json\n{}\n```\n",
])
def test_what_does_not_open_and_close_a_fence_stays_think(template, text):
    assert sample_like(template, text)[1] is None


@pytest.mark.parametrize("text, code", [
    ("```python\nprint(1)\n```", "print(1)\n"),
    ("```py\nprint(1)\n```\n", "print(1)\n"),
    ("a\n```python\n\n  print(1)\n   ```\n", "\n  print(1)\n"),
    ("```python\nprint(1)```\nprint(2)\n```\n", "print(1)```\nprint(2)\n"),
    ("```python\nprint('é∑')\n```\n", "print('é∑')\n"),
])
def test_code_is_what_stands_between_the_fences(template, text, code):
    if template.tokenizer.backend_tokenizer.model.__class__.__name__ == "WordLevel" and not text.isascii():
        pytest.skip("this vocabulary is ASCII")
    ids, act_start = sample_like(template, text)
    assert act_start is not None and code_of(template.decode(ids[act_start:])) == code


def closes_at(tokens: list[str]) -> int | None:
    """Which of these tokens, each one whole entry of a vocabulary, closes the block."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = wrap(Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])))
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    scanner = FenceScanner(Template(tokenizer))
    return next((i for i, token in enumerate(tokens) if scanner.push(vocabulary[token])), None)


@pytest.mark.parametrize("tail, index", [
    (["```"], 0),
    (["```\n"], 0),
    (["```\n\n"], 0),
    (["``", "`\n"], 1),
    (["``", "`"], 1),
    (["  ", " ```"], 1),
    (["```", "python"], 0),               # closed at the third backtick: what a later token adds comes too late
    (["```x", "\n"], None),               # something else in the very token
    (["````", "\n"], None),
    (["```\n\nThe", "\n"], None),
    (["x", "```", "\n"], None),           # glued to code
    (["x\n```"], 0),                      # newline and fence in one token
    (["x\n", "\n", "```"], 2),
])
def test_the_closing_fence_is_judged_inside_the_token_that_brings_the_third_backtick(tail, index):
    head = ["I add.\n", "\n```", "python", "\n", "print(1)", "\n"]
    found = closes_at(head + tail)
    assert found == (None if index is None else len(head) + index)


def test_the_scanner_stops_at_once_and_never_waits_for_one_more_token(template):
    ids = template.encode("```python\nprint(1)\n```\n\nso")
    scanner = FenceScanner(template)
    closed_at = next(i for i, token in enumerate(ids) if scanner.push(token))
    before = template.decode(ids[:closed_at])
    assert before.count("`") < 6 <= template.decode(ids[:closed_at + 1]).count("`")


def test_a_fence_opens_on_a_line_that_starts_with_python_or_py_and_code_is_never_found_by_the_word_in_prose(template):
    assert sample_like(template, "```python\nprint(1)\n```")[1] == sample_like(template, "```py\nprint(1)\n```")[1] == 0
    assert sample_like(template, "Now python\nprint(1)\n```\n")[1] is None


def test_the_observation_starts_on_a_line_of_its_own():
    assert observation_text("```python\nprint(1)\n```", OK) == "\n```output\n391\n```\n"
    assert observation_text("```python\nprint(1)\n```\n", OK) == "```output\n391\n```\n"


@pytest.mark.parametrize("execution, text", [
    (Execution("ok", "a\nb\n", "", 0.0), "a\nb"),
    (Execution("error", "half\n", "NameError: name 'x' is not defined", 0.0), "NameError: name 'x' is not defined"),
    (Execution("silent", "\n", "(no output: print the result)", 0.0), "(no output: print the result)"),
    (Execution("timeout", "1\n", "TimeoutError: exceeded 10 s", 0.0), "TimeoutError: exceeded 10 s"),
    (Execution("ok", "a" * 256, "", 0.0), "a" * 256),
    (Execution("ok", "a" * 200 + "b" * 57, "", 0.0), "a" * 128 + "..." + "a" * 71 + "b" * 57),
])
def test_what_is_shown_of_a_run_is_its_output_if_it_passed_else_the_error_alone(execution, text):
    assert shown(execution) == text


def test_sft_cuts_the_text_at_the_same_characters_and_encodes_piece_by_piece_with_the_same_function(template):
    """A response that was sampled token by token and one that was written give the same ids and the same spans."""
    written_ids, written_spans = encode_response(template, RESPONSE)
    sampled, spans = [], []
    think_act, act_start = sample_like(template, RESPONSE[:RESPONSE.index("```\n```output") + 3])
    sampled += think_act
    spans += [Span("think", 0, act_start), Span("act", act_start, len(sampled))]
    sampled += template.observation_ids(sampled[act_start:], OK)
    spans.append(Span("observe", spans[-1].end, len(sampled)))
    sampled += template.encode("So it is \\boxed{391}.") + [template.tokenizer.eos_token_id]
    spans.append(Span("think", spans[-1].end, len(sampled)))
    assert (written_ids, written_spans) == (sampled, spans)


def test_sft_never_trains_the_observation_and_always_trains_the_end_of_turn_token(template):
    ids, spans = encode_response(template, RESPONSE)
    mask = loss_mask(spans, len(ids))
    untrained = template.decode([token for token, trained in zip(ids, mask, strict=True) if not trained])
    assert untrained == "\n```output\n391\n```\n" and mask[-1] and ids[-1] == template.tokenizer.eos_token_id


def test_pieces_of_a_written_response_join_to_the_response():
    texts = [RESPONSE, RESPONSE * 2, "plain", "```python\nprint(1)\n```", "```python\nprint(1)\n``` \n\n```output\n1\n```",
             "```output\nmade up\n```\nthen", "```python\nx\n```\n```output\nnever closed"]
    assert all("".join(piece for _, piece in cut_response(text)) == text for text in texts)


def test_an_output_block_that_follows_no_code_is_the_authors_own_and_stays_policy():
    assert [kind for kind, _ in cut_response("```output\n4\n```\nso 4")] == ["policy"]
    assert [kind for kind, _ in cut_response(RESPONSE)] == ["policy", "observe", "policy"]


def test_output_blocks_that_the_model_writes_itself_are_counted():
    assert imitated_outputs(RESPONSE, num_observations=1) == 0
    assert imitated_outputs("```output\n4\n```\n" + RESPONSE, num_observations=1) == 1


def test_chat_prompts_end_where_the_assistant_begins_and_base_prompts_on_a_fresh_line(template):
    assert template.prompt_text("2+2?").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert Template(template.tokenizer, style="base").prompt_text("2+2?").endswith("Problem: 2+2?\nSolution:\n")


def test_the_system_flag_replaces_the_system_text(template):
    prompt = Template(template.tokenizer, system="Be brief.").prompt_text("2+2?")
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and prompt.count("system") == 1


def test_an_instruction_may_say_where_the_question_goes(template):
    prompt = Template(template.tokenizer, instruction="Problem: {question}\nBox it.").prompt_text("2+2?")
    assert "user\nProblem: 2+2?\nBox it.<|im_end|>" in prompt
    base = Template(template.tokenizer, style="base", instruction="Q: 1+1?\nA: 2\n\nQ: {question}\nA:").prompt_text("2+2?")
    assert base == "Q: 1+1?\nA: 2\n\nQ: 2+2?\nA:\n"


def test_whether_think_is_open_is_read_from_the_rendered_prompt(template):
    assert not template.is_thinking("<think>\n\n</think>\n\n")
    assert template.is_thinking("assistant\n<think>\n")
    assert Template(template.tokenizer, thinking=True).is_thinking("assistant\n")
    assert "</think>" in CLOSE_THINKING


def test_a_tokenizer_without_eos_or_template_is_refused():
    tokenizer = word_level()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Template(tokenizer, style="chat")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        Template(tokenizer, style="base")
    with pytest.raises(ValueError, match="base or chat"):
        Template(tokenizer, style="poem")


def test_a_directory_whose_tokenizer_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("broken")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer that can be loaded"):
        load_template(tmp_path, "base", "", None, False)


def test_sampling_stops_on_the_trained_eos_and_on_those_of_the_generation_config(tmp_path):
    tokenizer = word_level()
    assert stop_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert stop_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id, 3, 5}
