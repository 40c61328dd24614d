"""Comparing two evaluations: the interval is the paired bootstrap's, and what cannot be compared says so."""

import json
import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluate import EvaluateOptions
from thor import config
from thor.compare import (compare_pair, difference, difference_draws, mean_difference, measures, outcome, pairs, report,
                          verdict)
from thor.metrics import bootstrap
from thor.results import Result, Row, read_result, to_text

SETTINGS = {"model": "runs/a/latest", "benchmark": "data/bench.jsonl", "samples": 4, "temperature": 0.6, "top_p": 1.0,
            "top_k": 0, "max_response_tokens": 100, "max_code_rounds": 3, "max_thinking_tokens": 0, "cpu_seconds": 1.0,
            "grade_seconds": 5.0, "max_corrections": 0, "seed": 0,
            "versions": {"math-verify": "0.9.0", "sympy": "1.14.0"}}


def row(correct: list[int], question: str = "q", run: int = 1, passed: int = 1, tokens: int = 10) -> Row:
    n = len(correct)
    return Row(question, correct, [0] * n, [run] * n, [passed] * n, [tokens] * n)


def result(rows: dict[str, Row], name: str = "a.json", **settings: str | float | None) -> Result:
    return Result(Path(name), SETTINGS | settings, rows)


def random_rows(seed: int, problems: int = 30) -> list[Row]:
    rng = random.Random(seed)
    return [Row(f"q{i}", [rng.randrange(2) for _ in range(4)], None, runs := [rng.randrange(3) for _ in range(4)],
                [rng.randint(0, r) for r in runs], [rng.randrange(50) for _ in range(4)]) for i in range(problems)]


def test_a_difference_of_means_has_the_interval_of_the_bootstrapped_differences():
    first, second = (measures(random_rows(seed), 4)["avg@4"] for seed in (1, 2))
    expected = bootstrap(list(second[0] - first[0]))
    assert difference(first, second) == pytest.approx(expected) and expected["low"] < expected["high"]


def test_a_difference_of_pooled_rates_draws_the_same_problems_for_both():
    """The oracle adds up one draw after the other in plain Python."""
    rows = [random_rows(seed, 7) for seed in (1, 2)]
    draws = difference_draws(*(measures(side, 4)["execution_pass_rate"] for side in rows))
    drawn = np.random.default_rng(0).integers(0, 7, size=(500, 7))
    for draw in range(20):
        rates = [sum(sum(side[i].passed) for i in drawn[draw]) / sum(sum(side[i].run) for i in drawn[draw])
                 for side in rows]
        assert draws[draw] == pytest.approx(rates[1] - rates[0])
    assert len(draws) == 10_000


def test_what_makes_a_problem_hard_for_both_cancels_out():
    """B solves a tenth more of each problem than A: the interval is a point, however much problems differ."""
    first = (np.linspace(0, 0.9, 40), np.ones(40))
    found = difference(first, (first[0] + 0.1, np.ones(40)))
    assert [found[key] for key in ("low", "value", "high")] == pytest.approx([0.1] * 3)


def test_a_rate_of_nothing_has_no_difference():
    nothing = measures([row([1], run=0, passed=0)], 1)["execution_pass_rate"]
    assert difference(nothing, nothing) == {"value": None, "low": None, "high": None}


def test_a_draw_without_code_is_left_out_of_the_interval():
    rows = [row([1], "a", 0, 0), row([1], "b", 2, 1)]
    found = difference(*[measures(rows, 1)["execution_pass_rate"]] * 2)
    assert found == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_won_lost_and_tied_problems_are_counted_over_the_common_ones():
    first = result({"w": row([0, 0, 0, 1]), "l": row([1, 1, 1, 1]), "t": row([1, 0, 1, 0]), "alone": row([1] * 4)})
    second = result({"t": row([0, 1, 0, 1]), "w": row([1, 0, 0, 1]), "l": row([0, 1, 1, 1]),
                     "x": row([1] * 4), "y": row([1] * 4)})
    found = compare_pair(first, second, force=False)
    assert outcome(found) == (1, 1, 1)
    assert "bench: A is a.json, B is a.json; 3 common problems, A has 1 more alone, B 2" in report([found])


def test_two_problems_of_one_id_and_different_questions_are_not_paired():
    """Benchmarks number their problems: "1" is in all of them."""
    first, second = result({"1": row([1]), "2": row([1])}), result({"1": row([1], "other"), "2": row([0])})
    found = compare_pair(first, second, force=False)
    assert len(found.first) == 1 and outcome(found) == (0, 1, 0)
    assert "1 problems have the id of another question" in report([found])


@pytest.mark.parametrize("name, value", [("samples", 16), ("temperature", 1.0), ("top_p", 0.9), ("top_k", 20),
                                         ("max_response_tokens", 50), ("max_code_rounds", 0),
                                         ("max_thinking_tokens", 9),
                                         ("cpu_seconds", 9.0), ("grade_seconds", 1.0), ("temperature", None)])
def test_what_measures_must_agree_unless_forced_and_is_listed(name, value):
    first, second = result({"a": row([1])}), result({"a": row([0])}, "b.json", **{name: value})
    shown = "(not recorded)" if value is None else value
    with pytest.raises(ValueError, match="--force") as refused:
        compare_pair(first, second, force=False)
    assert f"({name} {SETTINGS[name]}, {shown})" in str(refused.value)
    assert f"compared by force: {name} {SETTINGS[name]}, {shown}" in report([compare_pair(first, second, force=True)])


def test_another_version_of_the_grader_is_a_different_measurement():
    second = result({"a": row([0])}, versions={"math-verify": "0.8.0", "sympy": "1.14.0"})
    with pytest.raises(ValueError, match=r"math-verify 0\.9\.0, 0\.8\.0"):
        compare_pair(result({"a": row([1])}), second, force=False)


def test_the_thing_compared_may_differ_and_is_named():
    second = result({"a": row([0])}, model="runs/b/latest", max_corrections=4, seed=3, device="cuda", slots=9)
    text = report([compare_pair(result({"a": row([1])}), second, force=False)])
    assert "what is compared: model runs/a/latest, runs/b/latest; max_corrections 0, 4; seed 0, 3\n" in text


def test_settings_that_neither_file_records_are_named():
    sides = [result({"a": row([1])}, temperature=None) for _ in range(2)]
    assert "not recorded in either, so not checked: temperature" in report([compare_pair(*sides, force=False)])


def test_a_note_is_printed_once_and_says_where_if_not_everywhere():
    pair = [compare_pair(result({name: row([1], name)}, benchmark=name),
                         result({name: row([0], name)}, model="m", seed=seed, benchmark=name), force=False)
            for name, seed in (("x", 0), ("y", 0), ("z", 1))]
    assert report(pair[:2]).count("what is compared: model runs/a/latest, m\n") == 1
    text = report(pair)
    assert "model runs/a/latest, m (in x, y)\n" in text and "model runs/a/latest, m; seed 0, 1 (in z)\n" in text


def test_forced_results_of_different_k_compare_each_with_its_own_samples():
    found = compare_pair(result({"a": row([1, 0])}), result({"a": row([1, 1, 1, 0])}, samples=4), force=True)
    assert outcome(found) == (1, 0, 0)
    assert "| pass@2 | 1.000 | 1.000 |" in report([found])


def test_the_mean_of_benchmarks_weighs_them_alike_and_draws_them_independently():
    sides = [[replace(r, question=f"{bench}{r.question}") for r in random_rows(seed, n)]
             for bench, n in (("x", 40), ("y", 40)) for seed in (1, 2)]
    found = [compare_pair(*(result({r.question: r for r in side}, benchmark=name) for side in sides[at:at + 2]), False)
             for name, at in (("x", 0), ("y", 2))]
    each = [difference(*(measures(side, 4)["avg@4"] for side in (c.first, c.second))) for c in found]
    mean = mean_difference(found)
    assert mean["value"] == pytest.approx((each[0]["value"] + each[1]["value"]) / 2)
    widths = [metric["high"] - metric["low"] for metric in each]
    independent = (widths[0] ** 2 + widths[1] ** 2) ** 0.5 / 2
    assert mean["high"] - mean["low"] == pytest.approx(independent, rel=0.1)
    assert "| mean of the benchmarks |" in report(found)


def test_pairs_that_share_problems_have_no_mean():
    pair = compare_pair(result({"a": row([1])}), result({"a": row([0])}), force=False)
    assert mean_difference([pair, pair]) is None and "mean of" not in report([pair, pair])


@pytest.mark.parametrize("low, value, high, words", [
    (-0.1, 0.1, 0.3, "do not tell A and B apart"), (0.0, 0.1, 0.2, "do not tell A and B apart"),
    (0.1, 0.2, 0.3, "B is better"), (-0.3, -0.2, -0.1, "A is better")])
def test_the_verdict_follows_from_the_interval(low, value, high, words):
    assert words in verdict({"low": low, "value": value, "high": high}, decided=6)


@pytest.mark.parametrize("decided, words", [(0, "the interval holds 0"), (1, "only 1 problems"), (5, "only 5 problems"),
                                            (6, "B is better")])
def test_a_handful_of_problems_gives_no_verdict_however_narrow_the_interval(decided, words):
    """All of them won: five are one side's by chance in 2 of 32 cases, six in 2 of 64."""
    tied = {"tied": row([1], "t")}
    first, second = (result(tied | {str(i): row([right], f"q{i}") for i in range(decided)}) for right in (0, 1))
    assert words in report([compare_pair(first, second, force=False)])


def write(path: Path, rows: dict[str, Row], **settings: str | float | None) -> str:
    path.write_text(to_text(SETTINGS | settings, {}, rows))
    return str(path)


def test_a_result_is_read_as_it_was_written(tmp_path):
    rows = {r.question: r for r in random_rows(3)}
    read = read_result(Path(write(tmp_path / "a.json", rows)))
    assert read.rows == rows and read.settings == SETTINGS
    assert (read.model, read.benchmark, read.samples) == ("a", "bench", 4)


def test_directories_are_paired_by_file_name_and_what_one_has_alone_is_said(tmp_path, capsys):
    for folder, names in (("A", "xyz"), ("B", "yzw")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.json").write_text("")
            (tmp_path / folder / f"{name}.responses.jsonl.settings.json").write_text("")
    first, second = tmp_path / "A", tmp_path / "B"
    assert pairs([first, second]) == [(first / f"{name}.json", second / f"{name}.json") for name in "yz"]
    assert capsys.readouterr().out == f"only in {first}, so not compared: x.json\nonly in {second}, so not compared: w.json\n"


def test_the_command_compares_pairs_and_draws_them(tmp_path, capsys):
    files = [write(tmp_path / f"{side}{bench}.json", {
                 f"{bench}{r.question}": replace(r, question=f"{bench}{r.question}") for r in random_rows(seed)},
                   benchmark=bench)
             for bench in ("math", "aime") for seed, side in enumerate("ab")]
    picture = tmp_path / "forest.png"
    config.run(evaluate.main, EvaluateOptions, "", ["--compare", *files, "--out", str(picture)])
    printed = capsys.readouterr().out
    assert "| math | 30 |" in printed and "| aime | 30 |" in printed and "| mean of the benchmarks |" in printed
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert width > 400 and height > 150


BAD = [
    (["GOOD"], "--compare takes A.json B.json"),
    (["GOOD", "GOOD", "GOOD"], "--compare takes A.json B.json"),
    (["DIR", "GOOD"], "--compare takes A.json B.json"),
    (["DIR/E", "DIR/E"], "no evaluation of the same name"),
    (["GOOD", "none.json"], "none.json does not exist"),
    (["GOOD", "TEXT"], "is not JSON"),
    (["GOOD", "LIST"], "has no settings and metrics"),
    (["GOOD", "OLD"], "has no results problem by problem: an older evaluate.py wrote it"),
    (["GOOD", "NEWER"], "problem 'a' has no tokens_generated: another version"),
    (["GOOD", "UNEVEN"], "same number of samples"),
    (["GOOD", "NO_ROWS"], "must be objects"),
    (["GOOD", "NO_SETTINGS"], "must be objects"),
    (["GOOD", "NO_VERSIONS"], "must be objects"),
    (["GOOD", "NO_ROW"], "problem 'a' has no classes, correct"),
    (["GOOD", "WORDS"], "problem 'a' has values that evaluate.py does not write"),
    (["GOOD", "PASSED"], "problem 'a' has values that evaluate.py does not write"),
    (["GOOD", "CLASSES"], "problem 'a' has values that evaluate.py does not write"),
    (["GOOD", "K16"], "measured differently (samples 4, 16)"),
    (["GOOD", "HOT"], "measured differently (temperature 0.6, 1.0)"),
    (["GOOD", "OTHER"], "no problem in common"),
    (["GOOD", "GOOD", "--out", "DIR/x.json"], "NAME.png"),
    (["GOOD", "GOOD", "--out", "DIR/no/x.png"], "NAME.png"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, arguments, message, capsys):
    good = {"a": row([1, 0])}
    whole = json.loads(to_text(SETTINGS, {}, good))
    (tmp_path / "E").mkdir()
    part = {name: value for name, value in whole["per_problem"]["a"].items() if name != "tokens_generated"}
    newer = whole | {"per_problem": {"a": part}}
    texts = {"GOOD": whole, "LIST": [1], "OLD": {k: whole[k] for k in ("settings", "metrics")}, "NEWER": newer,
             "NO_ROWS": whole | {"per_problem": [1]}, "NO_SETTINGS": whole | {"settings": [1]},
             "NO_VERSIONS": whole | {"settings": {"versions": "x"}}, "NO_ROW": whole | {"per_problem": {"a": 5}}}
    for name, change in (("WORDS", {"correct": "ab"}), ("PASSED", {"passed": [5, 5]}), ("CLASSES", {"classes": ["x", "y"]})):
        texts[name] = whole | {"per_problem": {"a": whole["per_problem"]["a"] | change}}
    places = {name: str(tmp_path / f"{name}.json") for name in [*texts, "TEXT", "UNEVEN", "K16", "HOT", "OTHER"]}
    for name, record in texts.items():
        Path(places[name]).write_text(json.dumps(record))
    Path(places["TEXT"]).write_text("{")
    write(Path(places["UNEVEN"]), good | {"b": row([1])})
    write(Path(places["K16"]), good, samples=16)
    write(Path(places["HOT"]), good, temperature=1.0)
    write(Path(places["OTHER"]), {"b": row([1, 1])})
    given = [places.get(argument, argument.replace("DIR", str(tmp_path))) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        config.run(evaluate.main, EvaluateOptions, "", ["--compare", *given])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed and printed.count("\n") == 1
