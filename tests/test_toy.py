"""The demo's small world: splits that share no problem, solutions that are right, a tokenizer that only joins."""

import json
import random
import subprocess
import sys

import pytest

from thor import toy
from thor.template import Template, encode_response
from thor.trajectory import loss_mask
from thor.weights import load_model


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="module")
def world() -> list[toy.ToyProblem]:
    return toy.problems("train", 220, seed=5)


def test_no_held_out_problem_is_among_those_trained_on():
    """By numbers, not by wording: a held-out problem told as a story must not be trained on as a plain question."""
    def keys(split: str, count: int) -> set:
        return {(p.family, tuple(sorted(p.steps[0].numbers.items()))) for p in toy.problems(split, count, 0)
                if p.family in toy.TASKS}

    train, tune, held_out = keys("train", 4000), keys("tune", 300), keys("held-out", 300)
    assert not (train & held_out or train & tune or tune & held_out) and len(held_out) > 150


def test_every_family_is_in_every_split_and_none_is_lost():
    for split in toy.SPLITS:
        assert {problem.family for problem in toy.problems(split, 200, 1)} == set(toy.FAMILIES)


def test_all_styles_of_a_program_print_the_same(world):
    """Each program of each task, run by a Python of its own, prints the result that the data claims."""
    seen, code, expected = set(), [], []
    for problem in world:
        for step, result in zip(problem.steps, problem.results, strict=True):
            if step.task.name not in seen:
                seen.add(step.task.name)
                for style in range(len(step.task.programs)):
                    code.append(step.program(style, dict(zip("xyz", "pqr", strict=True))))
                    expected.append(result)
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    assert seen == set(toy.TASKS) and done.stdout.split() == expected


def test_the_tokenizer_only_joins_and_knows_its_words(tokenizer, world):
    rng = random.Random(0)
    for problem in world:
        for text in (problem.question, toy.text_solution(problem), toy.code_solution(problem, rng, 0.5)):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text and len(ids) < 0.6 * len(text)
    assert tokenizer.tokenize("40967") == ["40", "96", "7"], "digits go in pairs, from the left"


def test_only_outputs_are_left_out_of_the_cold_start(tokenizer, world):
    template = Template(tokenizer, style="base", instruction="")
    problem = next(problem for problem in world if len(problem.steps) == 2)
    ids, spans = encode_response(template, toy.code_solution(problem, random.Random(0), 0.5))
    mask = loss_mask(spans, len(ids))
    untrained = tokenizer.decode([token for token, trained in zip(ids, mask, strict=True) if not trained])
    assert untrained == "".join(f"\n```output\n{result}\n```\n" for result in problem.results)


def test_no_text_of_the_base_model_is_a_tool_integrated_solution(tmp_path):
    toy.main(toy.ToyOptions(out=str(tmp_path), num_texts=80, num_solutions=22, num_problems=22, num_held_out=11))
    records = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert any("```python" in record["response"] for record in records)
    assert any("```output" in record["question"] for record in records)
    for record in records:  # no output in what it writes, no problem before what it programs
        assert "```output" not in record["response"]
        assert "```" not in record["response"] or record["question"].startswith("Write a program for")


def test_a_sentence_gives_its_task_back(world):
    for problem in world:
        assert toy.step_from_text(toy.text_solution(problem)) == problem.steps[0]
    assert toy.step_from_text("We look for trouble.") is None


def test_fixed_names_are_the_dial_for_names_that_vary():
    task, rng = toy.TASKS["gcd"], random.Random(0)
    assert all(toy.draw_names(task, rng, 1.0) == {"x": "a", "y": "b", "z": "r"} for _ in range(20))
    drawn = [toy.draw_names(task, rng, 0.0) for _ in range(50)]
    assert len({names["x"] for names in drawn}) > 8 and all(len(set(names.values())) == 3 for names in drawn)


def test_a_sloppy_program_uses_a_name_that_nobody_defined(world):
    rng = random.Random(0)
    for step in (step for problem in world for step in problem.steps):
        for style in range(len(step.task.programs)):
            names = toy.draw_names(step.task, rng, 0.5)
            with pytest.raises(NameError):
                exec(toy.mix_up(step.program(style, names), names, rng), {"print": lambda value: None})


def test_the_share_of_sloppy_programs_is_the_dial(world):
    blocks = [toy.code_block(world[0].steps[0], random.Random(seed), 0.3, 0.4) for seed in range(400)]
    clean = [toy.code_block(world[0].steps[0], random.Random(seed), 0.3, 0.0) for seed in range(400)]
    assert 120 < sum(a != b for a, b in zip(blocks, clean, strict=True)) < 200


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="it must be one of train, tune, held-out"):
        toy.problems("test", 3, 0)


def test_everything_that_the_demo_starts_from_is_written(tmp_path):
    toy.main(toy.ToyOptions(out=str(tmp_path), num_texts=22, num_solutions=22, num_problems=22, num_held_out=11))
    assert load_model(tmp_path / "untrained").config.num_layers == 3
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {
        "texts.jsonl", "scripted.jsonl", "tirgen.jsonl", "train.jsonl", "tune.jsonl", "held-out.jsonl"}
