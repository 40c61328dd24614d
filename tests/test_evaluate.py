"""Every number of evaluate.py on cases small enough to count by hand."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from code_records import CASES

import evaluate
from evaluate import EvaluateOptions, answer_classes, best_of, compute_metrics, majority_at_k, table
from thor import config
from thor.results import read_result
from thor.reward import Grader
from thor.trajectory import Attempt, Execution, Span, Trajectory, to_json

PASS, FAIL = Execution("ok", "1", "", 0.1), Execution("error", "", "NameError", 0.1)


def solution(problem: str, sample: int, boxed: str | None, runs: str = "", answer: str = "1/2",
             attempts: int = 0) -> Trajectory:
    """`runs` has a letter for each code block: p passed, f failed, - not run."""
    executions = [{"p": PASS, "f": FAIL, "-": None}[letter] for letter in runs]
    end = len(runs)
    spans = [Span("act", block, block + 1) for block in range(end)] + [Span("think", end, end + 1)]
    return Trajectory(problem, sample, "?", answer, [1], [2] * (end + 1), spans=spans, executions=executions, boxed=boxed,
                      finish="eos", attempts=[Attempt(0, 0, [2], [0.0], FAIL)] * attempts, corrections=attempts, tokens_generated=2)


@pytest.fixture(scope="module")
def grader():
    with Grader(1) as grader:
        yield grader


def graded(group: list[Trajectory], grader: Grader) -> list[Trajectory]:
    evaluate.grade_all([group], grader)
    return group


@pytest.fixture(scope="module")
def metrics(grader) -> dict:
    groups = [graded([solution("a", 0, "0.5", "pp"), solution("a", 1, "3", "pf")], grader),
              graded([solution("b", 0, None, ""), solution("b", 1, r"\frac12", "f-", attempts=2)], grader)]
    return compute_metrics(groups, grader)


@pytest.mark.parametrize("name, value, n", [
    ("avg@2", 0.5, None),                      # a: 1 of 2, b: 1 of 2
    ("pass@1", 0.5, None),
    ("pass@2", 1.0, None),
    ("maj@2", 1.0, None),                      # a: tie, and sample 0 is right; b: a sample without a box joins no class
    ("code_ratio", 3 / 4, 4),
    ("execution_pass_rate", 3 / 5, 5),         # p p | p f | | f ; the block that never ran counts nowhere
    ("first_try_pass_rate", 3 / 5, 5),         # b's first try at step 0 failed, as its kept one did
    ("correct_if_all_ran", 1.0, 1),
    ("correct_if_some_failed", 1 / 2, 2),
    ("corrections", 0.5, None),
])
def test_metrics_are_what_counting_by_hand_gives(metrics, name, value, n):
    assert metrics[name]["value"] == pytest.approx(value) and metrics[name].get("n") == n


def test_outcomes_and_finishes_are_counted(metrics):
    assert metrics["outcomes"] == {"ok": 3, "error": 2} and metrics["finishes"] == {"eos": 4}


def test_a_response_without_code_is_in_neither_conditional_and_an_empty_denominator_is_null(grader):
    found = compute_metrics([graded([solution("a", 0, "0.5")], grader)], grader)
    for name in ("correct_if_all_ran", "correct_if_some_failed", "execution_pass_rate"):
        assert found[name] == {"value": None, "low": None, "high": None, "n": 0}
    assert "–" in table(found)


def test_answers_are_grouped_by_equivalence_with_the_first_member(grader):
    group = [solution("a", i, box) for i, box in enumerate(["2", "0.5", None, r"\frac12", "2.0", "1/2"])]
    assert answer_classes(group, grader) == [0, 1, None, 1, 0, 1]


def test_majority_is_the_share_of_subsets_whose_largest_class_is_right(grader):
    group = graded([solution("a", i, box) for i, box in enumerate(["2", "1/2", "0.5", None])], grader)
    classes = answer_classes(group, grader)
    assert majority_at_k(group, classes, 4) == 1.0  # two halves against one 2
    by_hand = {(0, 1): 0, (0, 2): 0, (0, 3): 0, (1, 2): 1, (1, 3): 1, (2, 3): 1}  # ties: the lowest sample
    assert list(by_hand) == list(combinations(range(4), 2))
    assert majority_at_k(group, classes, 2) == pytest.approx(sum(by_hand.values()) / 6)


def test_majority_over_many_samples_is_a_seeded_estimate(grader):
    group = graded([solution("a", i, "1/2" if i % 3 else "2") for i in range(24)], grader)
    classes = answer_classes(group, grader)
    assert majority_at_k(group, classes, 12) == majority_at_k(group, classes, 12)
    assert 0.8 < majority_at_k(group, classes, 12) <= 1.0


@pytest.mark.parametrize("group, best", [
    ([("1", ""), ("2", "pf"), ("3", "pp")], 2),               # highest pass rate; no code is 0
    ([("1", ""), ("2", "f"), ("2", "")], 1),                  # all 0: the largest class, then the lowest index
    ([("1", "p"), ("2", "p"), ("2.0", "p")], 1),
    ([("1", "p"), ("2", "p")], 0),
    ([(None, ""), ("2", "")], 1),
])
def test_best_of_n_needs_no_label(grader, group, best):
    samples = [solution("a", i, box, runs) for i, (box, runs) in enumerate(group)]
    assert best_of(samples, answer_classes(samples, grader)) == best


def write(path, trajectories) -> str:
    path.write_text("".join(to_json(t) + "\n" for t in trajectories))
    return str(path)


def test_the_command_grades_a_file_and_records_every_setting(tmp_path, capsys):
    responses = write(tmp_path / "r.jsonl", [solution(p, s, "0.5", "p") for p in "abc" for s in (0, 1)])
    (tmp_path / "r.jsonl.settings.json").write_text(json.dumps({"temperature": 0.6, "seed": 7}))
    out = tmp_path / "scores.json"
    config.run(evaluate.main, EvaluateOptions, "", ["--responses", responses, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["metrics"]["avg@2"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    settings = result["settings"]
    assert (settings["temperature"], settings["seed"], settings["samples"], settings["problems"]) == (0.6, 7, 2, 3)
    assert set(settings["versions"]) == {"python", "torch", "transformers", "math-verify", "sympy"}
    lines = (tmp_path / "scores.disagreements.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["math_verify"] is True  # "0.5" is not the string "1/2"
    assert "avg@2" in capsys.readouterr().out


def test_generating_and_grading_in_one_command(tiny_directory, tmp_path):
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps({"id": str(n), "question": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(4)))
    out = tmp_path / "scores.json"
    arguments = ["--model", str(tiny_directory), "--benchmark", str(problems), "--out", str(out), "--style", "base",
                 "--instruction", "", "--samples", "2", "--max_response_tokens", "100"]
    config.run(evaluate.main, EvaluateOptions, "", arguments)
    result = json.loads(out.read_text())
    assert result["metrics"]["code_ratio"]["n"] == 8 and result["settings"]["max_response_tokens"] == 100
    assert len((tmp_path / "scores.responses.jsonl").read_text().splitlines()) == 8


def test_the_json_holds_every_sample_of_every_problem(tmp_path):
    """Problem a: a try that failed was dropped, its block passed; b: no box, and a block that never ran."""
    group = [replace(solution("a", 0, "0.5", "pp", attempts=1), tokens_generated=9), solution("a", 1, "3", "pf"),
             solution("b", 0, None, "-"), solution("b", 1, "1/2", "")]
    out = tmp_path / "scores.json"
    responses = write(tmp_path / "r.jsonl", group)
    config.run(evaluate.main, EvaluateOptions, "", ["--responses", responses, "--out", str(out)])
    rows = read_result(out).rows
    assert list(rows) == ["a", "b"] and rows["a"].question == rows["b"].question
    assert (rows["a"].correct, rows["a"].classes, rows["a"].run, rows["a"].passed) == ([1, 0], [0, 1], [2, 2], [2, 1])
    assert (rows["b"].correct, rows["b"].classes) == ([0, 1], [None, 1])
    assert (rows["b"].run, rows["b"].passed) == ([0, 0], [0, 0])
    assert rows["a"].tokens_generated == [9, 2]


def test_no_number_depends_on_the_order_in_which_samples_were_finished(tmp_path):
    rng, results = random.Random(1), []
    lines = [solution(p, s, rng.choice(["0.5", "2", "x^2+1", "(x+1)^2", None]), rng.choice(["p", "f"]), answer=a)
             for p, a in zip("dbca", ("1/2", "x^2+2x+1", "2", "1+x^2"), strict=True) for s in range(4)]
    for _ in range(3):
        rng.shuffle(lines)
        out = tmp_path / "scores.json"
        config.run(evaluate.main, EvaluateOptions, "", [
            "--responses", write(tmp_path / "r.jsonl", lines), "--out", str(out), "--graders", "1"])
        results.append(out.read_bytes())
    assert results[0] == results[1] == results[2] and b'"graded": 0' not in results[0]


def test_a_killed_evaluation_that_is_resumed_writes_the_json_of_an_uninterrupted_one(
        tiny_directory, tmp_path, monkeypatch, capsys):
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps({"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)}) + "\n"
                                for a in range(4) for b in range(5)))
    arguments = ["--model", str(tiny_directory), "--benchmark", str(problems), "--style", "base", "--instruction", "",
                 "--samples", "2", "--temperature", "1.0", "--max_response_tokens", "100", "--suffix_tokens", "6",
                 "--slots", "2",
                 "--threads", "1", "--graders", "1", "--out", "scores.json"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    process = subprocess.Popen([sys.executable, str(Path(evaluate.__file__)), *arguments], cwd=killed,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    responses = killed / "scores.responses.jsonl"
    while not (responses.is_file() and responses.read_bytes().count(b"\n") >= 5) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = responses.read_bytes().count(b"\n")
    assert 5 <= kept < 40 and not (killed / "scores.json").exists()
    for folder, more in ((whole, []), (killed, ["--resume"])):
        monkeypatch.chdir(folder)
        config.run(evaluate.main, EvaluateOptions, "", arguments + more)
    assert f"holds {kept} trajectories, and the run goes on from there" in capsys.readouterr().out
    assert (killed / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_more_samples_than_asked_for_are_not_averaged_silently():
    groups = [[solution("a", sample, "1") for sample in range(4)]]
    options = EvaluateOptions(model="m", benchmark="b", out="o.responses.jsonl", samples=2)
    with pytest.raises(ValueError, match="o.responses.jsonl holds 4 samples of each problem and --samples is 2"):
        evaluate.check_samples(options, groups)
    evaluate.check_samples(replace(options, samples=4), groups)
    evaluate.check_samples(replace(options, responses="o.responses.jsonl"), groups)


def test_resume_refuses_to_begin(tmp_path, capsys):
    """Who resumes and mistypes --out should not wait for a new run."""
    (tmp_path / "p.jsonl").write_text('{"id": "a", "question": "1+1", "answer": "2"}\n')
    with pytest.raises(SystemExit) as ended:
        config.run(evaluate.main, EvaluateOptions, "", [
            "--model", "m", "--benchmark", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "x.json"), "--resume"])
    assert ended.value.code == 2 and "--resume finds nothing begun" in capsys.readouterr().err
    assert not (tmp_path / "x.responses.jsonl").exists()


def test_a_model_answers_a_code_benchmark_while_it_runs_code(tiny_directory, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(CASES["mbpp"].record) + "\n")
    arguments = ["--model", str(tiny_directory), "--benchmark", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "s.json"), "--style",
                 "base", "--instruction", "Problem: 3+4\nSolution:", "--samples", "2", "--max_response_tokens", "60"]
    config.run(evaluate.main, EvaluateOptions, "", arguments)
    result = json.loads((tmp_path / "s.json").read_text())
    assert sum(result["metrics"]["verdicts"].values()) == 2 and "passed" not in result["metrics"]["verdicts"]
    (line, _) = (tmp_path / "s.responses.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "mbpp/9001" and json.loads(line)["correct"] is None


@pytest.mark.parametrize("arguments", [["--responses", "FILE", "--out", "FILE"],
                                       ["--benchmark", "FILE", "--model", "m", "--out", "FILE"],
                                       ["--benchmark", "CODE", "--check_canonical", "--out", "SCORES"]])
def test_what_was_there_and_is_no_older_result_is_not_overwritten(tmp_path, arguments, capsys):
    places = {"FILE": write(tmp_path / "r.jsonl", [solution("a", 0, "1")]), "SCORES": str(tmp_path / "scores.json"),
              "CODE": str(tmp_path / "code.jsonl")}
    (tmp_path / "code.jsonl").write_text(json.dumps(CASES["mbpp"].record) + "\n")
    (tmp_path / "scores.json").write_text('{"settings": {}, "metrics": {}}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as ended:
        config.run(evaluate.main, EvaluateOptions, "", [places.get(argument, argument) for argument in arguments])
    assert ended.value.code == 2 and "is there and holds something else" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("arguments, message", [
    ([], "--out is missing"),
    (["--out", "DIR/x.json"], "give --responses FILE"),
    (["--out", "DIR/x.json", "--responses", "none.jsonl"], "does not exist"),
    (["--out", "DIR", "--responses", "GOOD"], "cannot be written"),
    (["--out", "DIR/no/x.json", "--responses", "GOOD"], "cannot be written"),
    (["--out", "DIR/x.json", "--responses", "TWICE"], "line 2: sample 0 of problem 'a' has been seen before"),
    (["--out", "DIR/x.json", "--responses", "UNEVEN"], "different numbers of samples"),
    (["--out", "DIR/x.json", "--responses", "NO_ANSWER"], "has no answer"),
    (["--out", "DIR/x.json", "--responses", "LOST"], "1 responses were lost to failures of the sandbox"),
    (["--out", "DIR/x.json", "--responses", "BROKEN"], "line 1: not JSON"),
    (["--out", "DIR/x.json", "--responses", "EMPTY"], "is empty"),
    (["--out", "DIR/x.json", "--benchmark", "gsm9k", "--model", "m"], "math-500, aime-2024"),
    (["--out", "DIR/x.json", "--benchmark", "math-500", "--model", "m"], "local JSON-lines file"),
    (["--out", "DIR/x.json", "--benchmark", "math-500"], "--model is missing"),
])
def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, arguments, message, capsys):
    one = solution("a", 0, "1")
    files = {"GOOD": [one], "TWICE": [one, one], "UNEVEN": [one, solution("b", 0, "1"), solution("b", 1, "1")],
             "NO_ANSWER": [solution("a", 0, "1", answer=None)], "EMPTY": [],
             "LOST": [one, replace(one, id="b", finish="infrastructure")]}
    places = {name: write(tmp_path / name, trajectories) for name, trajectories in files.items()}
    (tmp_path / "BROKEN").write_text("{\n")
    places["BROKEN"] = str(tmp_path / "BROKEN")
    given = [places.get(argument, argument.replace("DIR", str(tmp_path))) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        config.run(evaluate.main, EvaluateOptions, "", given)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed
