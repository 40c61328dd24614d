"""Best-of-n and self-correction curves against counting subsets one by one, and the script that draws them."""

import json
import random
import struct
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from thor import config, curves
from thor.curves import best_of_n, corrections, cost_and_gain, subsets
from thor.metrics import bootstrap
from thor.results import Result, Row, row_of, to_text
from thor.trajectory import Execution, Span, Trajectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "runs"))

import curves as script  # noqa: E402
import evaluate  # noqa: E402

RUNS = {True: Execution("ok", "1", "", 0.0), False: Execution("error", "", "NameError", 0.0)}


def random_group(rng: random.Random, samples: int) -> tuple[list[Trajectory], list[int | None]]:
    """Graded samples of one problem and the classes of their answers."""
    group, classes, seen = [], [], {}
    for sample in range(samples):
        box = rng.choice([None, "right", "wrong", "worse"])
        runs = [rng.random() < 0.6 for _ in range(rng.randrange(4))]
        spans = [Span("act", block, block + 1) for block in range(len(runs))]
        group.append(Trajectory("p", sample, "?", "right", [1], [2] * len(runs), spans=spans,
                                executions=[RUNS[passed] for passed in runs], boxed=box, correct=box == "right",
                                finish="eos", tokens_generated=rng.randrange(100)))
        classes.append(None if box is None else seen.setdefault(box, sample))
    return group, classes


@pytest.fixture(scope="module")
def groups() -> list[tuple[list[Trajectory], list[int | None]]]:
    rng = random.Random(5)
    return [random_group(rng, 6) for _ in range(25)]


@pytest.fixture(scope="module")
def result(groups) -> Result:
    return Result(Path("a.json"), {"max_corrections": 0}, {str(i): row_of(*group) for i, group in enumerate(groups)})


def slow_best_of(group: list[Trajectory], classes: list[int | None], n: int) -> list[int]:
    """The sample that evaluate.best_of trusts, of each subset."""
    return [subset[evaluate.best_of([group[i] for i in subset], [classes[i] for i in subset])]
            for subset in combinations(range(len(group)), n)]


@pytest.mark.parametrize("n", range(1, 7))
def test_each_point_is_what_counting_every_subset_gives(groups, result, n):
    point = best_of_n(result)[n - 1]
    maj = [evaluate.majority_at_k(group, classes, n) for group, classes in groups]
    best = [np.mean([group[i].correct for i in slow_best_of(group, classes, n)]) for group, classes in groups]
    oracle = [np.mean([any(group[i].correct for i in s) for s in combinations(range(6), n)]) for group, _ in groups]
    assert point.majority == pytest.approx(bootstrap(maj)) and point.best_of == pytest.approx(bootstrap(best))
    assert point.oracle == pytest.approx(bootstrap(oracle))
    tokens = np.mean([n * np.mean([t.tokens_generated for t in group]) for group, _ in groups])
    assert point.n == n and point.tokens["value"] == pytest.approx(tokens)


def test_the_pass_rate_is_that_of_the_sample_that_best_of_chooses(groups, result):
    def rate(trajectory: Trajectory) -> float:
        passed = [run.passed for run in trajectory.executions]
        return sum(passed) / len(passed) if passed else 0.0

    expected = np.mean([np.mean([rate(group[i]) for i in slow_best_of(group, classes, 3)])
                        for group, classes in groups])
    assert best_of_n(result)[2].pass_rate["value"] == pytest.approx(expected)


def test_one_sample_leaves_nothing_to_choose_and_all_of_them_are_the_evaluations_own_numbers(groups, result):
    points = best_of_n(result)
    accuracy = np.mean([t.correct for group, _ in groups for t in group])
    first = points[0]
    assert [m["value"] for m in (first.majority, first.best_of, first.oracle)] == pytest.approx([accuracy] * 3)
    chosen = [group[evaluate.best_of(group, classes)].correct for group, classes in groups]
    assert points[-1].best_of["value"] == pytest.approx(np.mean(chosen)) and len(points) == 6


def test_many_subsets_are_drawn_once_with_a_seed_and_few_are_all_there():
    assert len(subsets(6, 3)) == 20 and len(subsets(16, 8)) == curves.MAX_SUBSETS
    assert (subsets(16, 8) == subsets(16, 8)).all() and (subsets(16, 8).sum(1) == 8).all()
    assert abs(subsets(16, 8).mean(0) - 0.5).max() < 0.06  # every sample is in about half of them


def test_majority_over_many_samples_is_that_of_the_evaluation():
    group, classes = random_group(random.Random(8), 16)
    found = curves.majority(row_of(group, classes), subsets(16, 9))
    assert found == pytest.approx(evaluate.majority_at_k(group, classes, 9))


def test_answers_without_classes_have_no_majority():
    row = Row("q", [1, 0], None, [1, 1], [1, 0], [3, 4])
    point = best_of_n(Result(Path("a"), {}, {"q": row}))[1]
    assert point.majority is None and point.best_of["value"] == 1.0 and "–" in curves.best_of_n_table([point])


def corrected(number: int | None, correct: list[int], tokens: int, passed: int = 1, question: str = "q",
              **settings: float | str) -> Result:
    n = len(correct)
    row = Row(question, correct, [0] * n, [2] * n, [passed] * n, [tokens] * n)
    known = {"max_corrections": number, "model": "m", "temperature": 1.0}
    return Result(Path(f"{number}.json"), known | settings, {"q": row})


def test_what_retries_cost_and_buy_is_paired_with_the_first_point_in_rising_order():
    points = corrections([corrected(4, [1, 1, 1, 0], 15, 2), corrected(0, [0, 1, 0, 0], 10),
                          corrected(2, [0, 1, 1, 0], 12)])
    assert [p.corrections for p in points] == [0, 2, 4]
    assert [p.gain["value"] for p in points] == [0.0, 0.25, 0.5]
    assert [p.extra_tokens["value"] for p in points] == [0, 2, 5]
    assert [p.pass_rate["value"] for p in points] == [0.5, 0.5, 1.0]
    sentence = cost_and_gain(points[0], points[-1])
    assert "cost +5.0 tokens a response (+50.0%) and buy +50.0 points" in sentence and "from 0.500 to 1.000" in sentence


def write(path: Path, result: Result) -> str:
    path.write_text(to_text(result.settings, {}, result.rows))
    return str(path)


def call(*arguments: str) -> None:
    config.run(script.main, script.Options, "", [str(argument) for argument in arguments])


def test_curves_of_several_models_are_drawn_side_by_side(tmp_path, result, capsys):
    files = [write(tmp_path / f"{n}.json", Result(Path(), result.settings | {"model": f"runs/{n}/latest"}, result.rows))
             for n in "ab"]
    call("--curve", "samples", "--results", *files, "--out", tmp_path)
    assert "### a\n" in capsys.readouterr().out and (tmp_path / "curve-samples.md").read_text().count("| 6 |") == 2
    files = [write(tmp_path / f"{n}{model}.json", corrected(n, [n > 0, 1], 10 + n, model=model))
             for n in (0, 1) for model in "cd"]
    call("--curve", "corrections", "--results", *files, "--out", tmp_path)
    assert (tmp_path / "curve-corrections.md").read_text().count("and buy +50.0 points") == 2
    for name in ("samples", "corrections"):
        assert struct.unpack(">I", (tmp_path / f"curve-{name}.png").read_bytes()[16:20])[0] > 700  # pixels wide


def test_the_script_evaluates_each_number_of_retries_and_does_nothing_twice(tiny_directory, tmp_path, capsys):
    problems = tmp_path / "p.jsonl"
    lines = [{"id": f"{n}", "question": f"{n}+1", "answer": str(n + 1)} for n in range(4)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    arguments = ["--model", tiny_directory, "--benchmark", problems, "--out", out, "--style", "base",
                 "--instruction", "", "--samples", "2", "--max_response_tokens", "100", "--temperature", "1.0",
                 "--suffix_tokens", "6"]
    call("--curve", "corrections", "--max_corrections", "1", *arguments)
    table = (out / "curve-corrections.md").read_text()
    settings = [json.loads((out / f"corrections-{n}.json").read_text())["settings"]["max_corrections"] for n in (0, 1)]
    assert settings == [0, 1] and "| 0 | " in table and "| 1 | " in table
    before = (out / "corrections-0.responses.jsonl").read_bytes()
    capsys.readouterr()
    call("--curve", "corrections", "--max_corrections", "1", *arguments)
    assert capsys.readouterr().out.count("nothing left to do") == 2
    assert (out / "curve-corrections.md").read_text() == table
    assert (out / "corrections-0.responses.jsonl").read_bytes() == before


@pytest.mark.parametrize("arguments, message", [
    (["--curve", "tokens", "--out", "DIR"], "curve is 'tokens'; it must be samples or corrections"),
    (["--curve", "samples"], "--out is missing"),
    (["--curve", "samples", "--out", "DIR", "--responses", "x"], "belong to evaluate.py"),
    (["--curve", "samples", "--out", "DIR"], "give --responses FILE"),
    (["--curve", "corrections", "--out", "DIR", "--max_corrections", "0"], "must be 1 or more"),
    (["--curve", "samples", "--out", "DIR", "--results", "none.json"], "does not exist"),
    (["--curve", "corrections", "--out", "DIR", "--results", "ZERO"], "needs two results or more"),
    (["--curve", "corrections", "--out", "DIR", "--results", "ZERO", "ZERO"], "needs two results or more"),
    (["--curve", "corrections", "--out", "DIR", "--results", "ZERO", "HOT"],
     "differ in more than max_corrections: temperature 1.0, 0.6"),
    (["--curve", "corrections", "--out", "DIR", "--results", "ZERO", "SEED"],
     "differ in more than max_corrections: seed"),
    (["--curve", "corrections", "--out", "DIR", "--results", "ZERO", "OTHER"], "has other problems than"),
    (["--curve", "corrections", "--out", "DIR", "--results", "ZERO", "TESTS"], "has other problems than"),
    (["--curve", "corrections", "--out", "DIR", "--results", "ZERO", "UNKNOWN"], "does not say its max_corrections"),
])
def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, arguments, message, capsys):
    made = {"ZERO": corrected(0, [1], 1), "HOT": corrected(1, [1], 1, temperature=0.6),
            "SEED": corrected(1, [1], 1, seed=3),
            "OTHER": corrected(1, [1], 1, question="x"), "UNKNOWN": corrected(None, [1], 1)}
    row = replace(made["ZERO"].rows["q"], tests="of another benchmark")
    made["TESTS"] = replace(corrected(1, [1], 1), rows={"q": row})
    places = {name: write(tmp_path / f"{name}.json", result) for name, result in made.items()}
    with pytest.raises(SystemExit) as ended:
        call(*(places.get(argument, argument.replace("DIR", str(tmp_path))) for argument in arguments))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed
