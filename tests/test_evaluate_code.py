"""evaluate.py on code benchmarks: numbers on cases that can be counted by hand, the commands, and bad input."""

import json
from dataclasses import replace

import pytest
from code_records import CASES, PAIRS

import evaluate
from evaluate import EvaluateOptions
from thor import config
from thor.results import read_result
from thor.trajectory import Execution, Span, Trajectory, to_json

MBPP = CASES["mbpp"].record
BROKEN = MBPP | {"task_id": 9009, "test_list": ["assert pairs([1, 2], 3) == 'another version of it'"]}
RIGHT, WRONG = f"So:\n```python\n{PAIRS}```\n", "```python\ndef pairs(*_): return set()\n```\n"


def response(problem: str, sample: int, text: str) -> Trajectory:
    runs = [Execution("silent", "", "(no output: print the result)", 0.1)] if "```" in text else []
    spans = [Span("think", 0, 1)] + [Span("act", 1, 2)] * len(runs)
    return Trajectory(problem, sample, "?", None, [1], [2] * len(spans), spans=spans, executions=runs, text=text, finish="eos")


def write(path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def command(*arguments: str) -> None:
    config.run(evaluate.main, EvaluateOptions, "", list(arguments))


def test_a_file_of_responses_is_graded_by_the_tests(tmp_path, capsys):
    second = MBPP | {"task_id": 9010}
    benchmark = write(tmp_path / "b.jsonl", [json.dumps(record) for record in (MBPP, second, BROKEN)])
    texts = {"mbpp/9001": [RIGHT, WRONG, RIGHT, "I do not know."], "mbpp/9010": [WRONG] * 4, "mbpp/9009": [RIGHT] * 4}
    responses = write(tmp_path / "r.jsonl", [to_json(response(problem, sample, text))
                                             for problem, given in texts.items() for sample, text in enumerate(given)])
    command("--responses", responses, "--benchmark", benchmark, "--out", str(tmp_path / "scores.json"))
    result = json.loads((tmp_path / "scores.json").read_text())
    metrics, settings = result["metrics"], result["settings"]
    assert metrics["verdicts"] == {"passed": 2, "no_code": 1, "wrong_answer": 5, "broken_tests": 4}
    assert settings["broken_tests"] == ["mbpp/9009"] and (settings["problems"], settings["samples"]) == (2, 4)
    assert settings["benchmark"] == benchmark and settings["test_seconds"] == 10.0
    assert metrics["avg@4"]["value"] == metrics["pass@1"]["value"] == pytest.approx(2 / 8)
    assert metrics["pass@2"]["value"] == pytest.approx((1 - 1 / 6) / 2)  # of the six pairs of the first, one has no right answer
    assert metrics["pass@4"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert metrics["code_ratio"]["value"] == pytest.approx(7 / 8) and not any(name.startswith("maj@") for name in metrics)
    lines = [json.loads(line) for line in (tmp_path / "scores.verdicts.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[0] == {"id": "mbpp/9001", "sample": 0, "kind": "passed", "detail": ""}
    rows = read_result(tmp_path / "scores.json").rows
    assert rows["mbpp/9001"].correct == [1, 0, 1, 0] and rows["mbpp/9001"].classes is None and "mbpp/9009" not in rows
    assert "1 problems left out" in capsys.readouterr().out


def test_a_message_that_utf_8_cannot_write_ends_no_evaluation(tmp_path):
    text = "```python\ndef pairs(*_):\n    raise ValueError('\\ud800')\n```\n"
    responses = write(tmp_path / "r.jsonl", [to_json(response("mbpp/9001", 0, text))])
    benchmark = write(tmp_path / "b.jsonl", [json.dumps(MBPP)])
    command("--responses", responses, "--benchmark", benchmark, "--out", str(tmp_path / "scores.json"))
    assert json.loads((tmp_path / "scores.verdicts.jsonl").read_text())["detail"] == "ValueError: \ud800"


def rows_of(place, record: dict, question: str) -> str:
    """The JSON of an evaluation of six right responses to six copies of the record, which was put in these words."""
    place.mkdir()
    copies = [record | {"task_id": number} for number in range(6)]
    given = [replace(response(f"mbpp/{number}", 0, RIGHT), question=question) for number in range(6)]
    command("--responses", write(place / "r.jsonl", list(map(to_json, given))), "--benchmark", write(
        place / "b.jsonl", list(map(json.dumps, copies))), "--out", str(place / "scores.json"))
    return str(place / "scores.json")


def test_styles_that_ask_in_other_words_can_be_compared_and_other_tests_of_the_same_task_cannot(tmp_path, capsys):
    first = rows_of(tmp_path / "a", MBPP, "in chat style")
    command("--compare", first, rows_of(tmp_path / "b", MBPP, "the beginning of a file"))
    assert "6 common problems" in capsys.readouterr().out
    more = MBPP | {"test_list": [*MBPP["test_list"], "assert pairs([1, 1], 2) == {(1, 1)}"]}
    with pytest.raises(SystemExit) as ended:
        command("--compare", first, rows_of(tmp_path / "c", more, "in chat style"))
    assert ended.value.code == 2 and "no problem in common" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_settings_beside_responses_that_cannot_be_read_are_named(tmp_path, text, message, capsys):
    responses = write(tmp_path / "r.jsonl", [to_json(response("mbpp/9001", 0, RIGHT))])
    write(tmp_path / "r.jsonl.settings.json", [text])
    with pytest.raises(SystemExit) as ended:
        command("--responses", responses, "--benchmark", write(tmp_path / "b.jsonl", [json.dumps(MBPP)]), "--out",
                str(tmp_path / "x.json"))
    assert ended.value.code == 2 and f"r.jsonl.settings.json {message}" in capsys.readouterr().err


def test_the_benchmarks_own_solutions_can_be_checked_without_a_model(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", [json.dumps(MBPP)])
    both = write(tmp_path / "both.jsonl", [json.dumps(MBPP), json.dumps(BROKEN)])
    command("--benchmark", good, "--check_canonical", "--out", str(tmp_path / "x.json"))
    assert "1 of 1 solutions" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command("--benchmark", both, "--check_canonical", "--out", str(tmp_path / "x.json"))
    assert ended.value.code == 1 and "1 of 2 solutions" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "x.json").read_text())["failed"]) == ["mbpp/9009"]


@pytest.mark.parametrize("arguments, message", [
    (["--benchmark", "CODE"], "--model is missing"),
    (["--benchmark", "LIVE", "--check_canonical"], "has no solutions of its own"),
    (["--benchmark", "math-500", "--check_canonical"], "it must be a file of one, or one of humaneval, humaneval+"),
    (["--check_canonical"], "it must be a file of one, or one of humaneval, humaneval+"),
    (["--benchmark", "CODE", "--responses", "OTHER"], "the responses have a problem 'a', which the benchmark has not"),
    (["--benchmark", "CODE", "--responses", "BROKEN"], "no own solution"),
    (["--benchmark", "VERSION", "--responses", "OTHER"], "line 1: a version of a code benchmark that is not known"),
    (["--benchmark", "humaneval+", "--model", "m"], "local JSON-lines file"),
    (["--benchmark", "livecodebench", "--model", "m"], "local JSON-lines file"),
    (["--benchmark", "CODE", "--responses", "OTHER", "--test_seconds", "0"], "cpu_seconds is 0.0; it must be above 0"),
])
def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, arguments, message, capsys):
    places = {"CODE": write(tmp_path / "c.jsonl", [json.dumps(MBPP)]), "LIVE": write(
        tmp_path / "l.jsonl", [json.dumps(CASES["livecodebench-stdin"].record)]), "VERSION": write(
        tmp_path / "v.jsonl", [json.dumps({"task_id": "x", "entry_point": "f"})]), "OTHER": write(
        tmp_path / "o.jsonl", [to_json(response("a", 0, RIGHT))])}
    if "BROKEN" in arguments:
        places |= {"CODE": write(tmp_path / "c.jsonl", [json.dumps(BROKEN)]),
                   "BROKEN": write(tmp_path / "r.jsonl", [to_json(response("mbpp/9009", 0, RIGHT))])}
        message = "the benchmark's own solutions fail all of its tests"
    with pytest.raises(SystemExit) as ended:
        command(*(places.get(argument, argument) for argument in arguments), "--out", str(tmp_path / "x.json"))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed
