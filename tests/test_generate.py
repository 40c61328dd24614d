"""generate.py as its users meet it: a command line, files that grow, and one sentence when something is wrong."""

import asyncio
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import tiny
from generate import DEMO_MODEL, MAX_LOST, GenerateOptions, Sink, demo_defaults, main, render
from thor import config
from thor.template import Template
from thor.trajectory import Attempt, Execution, Span, Trajectory, from_json, to_json

ROOT = Path(__file__).parent.parent
BASE = ["--style", "base", "--instruction", "", "--temperature", "1.0", "--max_response_tokens", "100", "--samples", "2",
        "--suffix_tokens", "6", "--threads", "1"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    lines = [{"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)} for a in range(6) for b in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def comparable(path: Path) -> list[dict]:
    """The trajectories of a file in order of problem and sample, without what a clock measured."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        for run in record["executions"] + [attempt["execution"] for attempt in record["attempts"]]:
            if run:
                run["seconds"] = 0.0
    return sorted(records, key=lambda record: (record["id"], record["sample"]))


@pytest.fixture(scope="module")
def uninterrupted(problems, tiny_directory, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "all.jsonl"
    result = call("--model", tiny_directory, "--problems", problems, "--out", out, *BASE)
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stderr and "tokens/s" in result.stderr
    return out


def test_every_problem_gets_its_samples_graded_and_really_run(uninterrupted):
    records = [from_json(line) for line in uninterrupted.read_text().splitlines()]
    assert len(records) == 60 and len({(t.id, t.sample) for t in records}) == 60
    assert any(t.correct for t in records) and any(t.corrections for t in records)
    good = [t for t in records if t.executions and t.executions[-1] and t.executions[-1].passed]
    assert all(f"```output\n{t.executions[-1].stdout.strip()}\n" in t.text for t in good if t.finish == "eos") and good


def test_a_killed_run_continues_and_loses_at_most_what_was_in_flight(uninterrupted, problems, tiny_directory, tmp_path):
    out = tmp_path / "killed.jsonl"
    arguments = ("--model", tiny_directory, "--problems", problems, "--out", out, *BASE, "--slots", "4")
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (out.is_file() and out.read_bytes().count(b"\n") >= 8) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = out.read_bytes()
    kept = kept[:kept.rfind(b"\n") + 1]
    assert 8 <= kept.count(b"\n") < 60
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    assert out.read_bytes().startswith(kept)
    assert comparable(out) == comparable(uninterrupted), "slots and the kill must not change a trajectory"
    assert "nothing left to do" in call(*arguments).stdout


def test_other_settings_are_never_mixed_into_a_file(uninterrupted, problems, tiny_directory):
    before = uninterrupted.read_bytes()
    result = call("--model", tiny_directory, "--problems", problems, "--out", uninterrupted, *BASE, "--seed", "1")
    assert result.returncode == 2 and "seed was 0, is 1" in result.stderr and uninterrupted.read_bytes() == before


def test_solutions_of_another_problem_are_never_mixed_into_a_file(uninterrupted, tiny_directory, tmp_path):
    """The same id with another question, as two benchmarks may have it, would be taken for done."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "0+0", "question": "9+9", "answer": "18"}\n')
    result = call("--model", tiny_directory, "--problems", other, "--out", uninterrupted, *BASE)
    assert result.returncode == 2 and "another problem" in result.stderr


def test_a_file_whose_settings_are_not_known_is_not_continued(uninterrupted, problems, tiny_directory, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(uninterrupted.read_bytes())
    result = call("--model", tiny_directory, "--problems", problems, "--out", copy, *BASE)
    assert result.returncode == 2 and "copy.jsonl.settings.json is missing" in result.stderr


def test_a_file_that_is_not_ours_keeps_its_last_line(problems, tiny_directory, tmp_path):
    """Half a line at the end is cut off where a killed run left it, and nowhere else: here --out is the problems."""
    other = tmp_path / "other.jsonl"
    other.write_text(problems.read_text().rstrip("\n"))
    before = other.read_text()
    result = call("--model", tiny_directory, "--problems", other, "--out", other, *BASE)
    assert result.returncode == 2 and "other.jsonl.settings.json is missing" in result.stderr
    assert other.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


def test_what_the_sandbox_lost_is_dropped_and_counted_and_past_a_threshold_the_run_stops_with_a_clear_error():
    """It is never reward 0: a lost trajectory is neither written nor graded."""
    options, file = GenerateOptions(out="o.jsonl", model="m"), io.StringIO()
    sink = Sink(options, file, tqdm(disable=True))
    lost = Trajectory("a", 0, "1+1", "2", [1], finish="infrastructure")

    async def take(count: int) -> None:
        for _ in range(count):
            await sink.take(lost)

    asyncio.run(take(MAX_LOST))
    assert (sink.lost, sink.correct, file.getvalue()) == (MAX_LOST, [], "")
    with pytest.raises(ValueError, match="the sandbox failed in 9 of 9 trajectories"):
        asyncio.run(take(1))


def test_one_question_prints_its_spans(tiny_directory):
    result = call("--model", tiny_directory, "--question", "3+4", *BASE)
    assert result.returncode == 0 and result.stdout.count("--- sample ") == 2 and "```python" in result.stdout
    assert "\033[" not in result.stdout, "no colours into a pipe"


def test_dashes_and_underscores_are_both_taken():
    dashes = [argument.replace("_", "-") if argument.startswith("--") else argument for argument in BASE]
    assert config.parse(GenerateOptions, "", dashes) == config.parse(GenerateOptions, "", BASE)
    assert config.parse(GenerateOptions, "", BASE).max_response_tokens == 100


def test_dropped_attempts_are_shown_where_they_were_dropped():
    template = Template(tiny.make_tokenizer(), style="base")
    ids = template.encode("Add.\n```python\nprint(1+1)\n```")
    failed = template.encode("```python\nprint(x)\n```")
    attempt = Attempt(0, 3, failed, [0.0] * len(failed), Execution("error", "", "NameError: x", 0.0))
    trajectory = Trajectory("q", 0, "1+1", None, [1], ids, spans=[Span("think", 0, 3), Span("act", 3, len(ids))],
                            executions=[None], attempts=[attempt], corrections=1)
    plain = render(trajectory, template, colour=False)
    assert plain.index("Add.") < plain.index("[dropped: ```python\nprint(x)\n``` → NameError: x]") < plain.index("1+1")
    assert "\033[36m```python" in render(trajectory, template, colour=True)


@pytest.mark.parametrize("arguments, message", [
    (["--problems", "p.jsonl"], "--model is missing"),
    (["--model", "TINY"], "either --question or --problems"),
    (["--model", "TINY", "--question", "x", "--problems", "y"], "either --question or --problems"),
    (["--model", "TINY", "--problems", "PROBLEMS"], "needs --out"),
    (["--model", "no/such", "--question", "x"], "not a directory"),
    (["--model", "TINY", "--question", " "], "question is empty"),
    (["--model", "TINY", "--question", "1+" * 300, "--style", "base"], "does not fit the model's context of 256"),
    (["--model", "TINY", "--question", "x", "--max_corrections", "-1"], "max_corrections is -1"),
    (["--model", "TINY", "--question", "x", "--max_response_tokens", "0"], "max_response_tokens is 0"),
    (["--model", "TINY", "--question", "x", "--samples", "0"], "samples is 0"),
    (["--model", "TINY", "--question", "x", "--temperature", "-1"], "temperature is -1"),
    (["--model", "TINY", "--question", "x", "--dtype", "int3"], "dtype is 'int3'"),
    (["--model", "TINY", "--question", "x", "--device", "gpu"], "device is 'gpu'; it must be cpu or cuda"),
    (["--model", "TINY", "--question", "x", "--style", "poem"], "style is 'poem'"),
    (["--model", "TINY", "--question", "x", "--sandbox", "nowhere"], "sandbox"),
    (["--model", "TINY", "--problems", "none.jsonl", "--out", "o"], "does not exist"),
    (["--model", "TINY", "--problems", "PROBLEMS", "--out", "/proc/no/such.jsonl"], "cannot be written"),
    (["--replay", "none.jsonl"], "does not exist"),
    (["--replay", "PROBLEMS", "--question", "x"], "leave --question and --problems out"),
    (["--replay", "NO_MODEL"], "name no model; give --model"),
    (["--question", "x", "--recorded_tools"], "name it with --replay"),
    (["--nonsense", "1"], "nonsense"),
])
def test_bad_input_gets_one_sentence_and_exit_code_2(tiny_directory, problems, tmp_path, arguments, message, capsys):
    (tmp_path / "t.jsonl").write_text(to_json(Trajectory("a", 0, "1+1", "2", [1])) + "\n")
    (tmp_path / "t.jsonl.settings.json").write_text("{}")
    places = {"TINY": str(tiny_directory), "PROBLEMS": str(problems), "NO_MODEL": str(tmp_path / "t.jsonl")}
    with pytest.raises(SystemExit) as ended:
        config.run(main, GenerateOptions, "", [places.get(argument, argument) for argument in arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "Traceback" not in printed
    assert printed.count("error: ") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="device is 'cuda', and torch finds no CUDA device on this machine"):
        config.check_device("cuda")


def test_every_flag_has_a_line_of_help():
    assert all(field.metadata["help"] for field in fields(GenerateOptions))


@pytest.mark.parametrize("tools", [[], ["--recorded_tools"]])
def test_a_recorded_file_is_sampled_again_to_the_last_token(uninterrupted, tools):
    result = call("--replay", uninterrupted, *tools)
    assert result.returncode == 0 and result.stdout.count(": the same ") == 60, result.stdout + result.stderr
    assert "60 of 60 trajectories are the same to the last token" in result.stdout


def test_a_replay_names_the_first_token_that_differs(uninterrupted, tmp_path):
    records = [json.loads(line) for line in uninterrupted.read_text().splitlines()][:3]
    changed = records[1]["response_ids"]
    place = len(changed) // 2
    changed[place] += 1
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = uninterrupted.with_name(uninterrupted.name + ".settings.json").read_text()
    path.with_name("changed.jsonl.settings.json").write_text(settings)
    result = call("--replay", path)
    assert result.returncode == 1 and "2 of 3 trajectories are the same" in result.stdout, result.stderr
    assert f"was {changed[place]}, is {changed[place] - 1}" in result.stdout


def test_recorded_tools_answer_with_the_record_and_not_with_the_code(uninterrupted, tmp_path):
    records = [json.loads(line) for line in uninterrupted.read_text().splitlines()]
    record = next(r for r in records if not r["attempts"] and r["finish"] == "eos" and r["executions"] and
                  r["executions"][0]["outcome"] == "ok")
    record["executions"][0]["stdout"] = "987\n"  # what no code here prints; the recorded tokens still hold the old output
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps(record) + "\n")
    settings = uninterrupted.with_name(uninterrupted.name + ".settings.json").read_text()
    path.with_name("other.jsonl.settings.json").write_text(settings)
    assert call("--replay", path).returncode == 0
    result = call("--replay", path, "--recorded_tools")
    assert result.returncode == 1 and "differs after" in result.stdout and "in the response" in result.stdout


def test_the_first_command_of_the_readme_prints_what_the_readme_shows():
    """A question without --model: thought, code that fails and is dropped, another try, output, answer; on this machine."""
    readme = (ROOT / "README.md").read_text()
    given, shown = re.search(r"\npython generate\.py (--seed .*?)\n```.*?````text\n(.*?)\n````\n", readme, re.S).groups()
    ran = call(*shlex.split(given))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == shown.strip()
    assert "[dropped:" in shown and "1 corrections" in shown


@pytest.mark.parametrize("temperature", [0.2, GenerateOptions().temperature])  # the script's own default, asked for, counts too
def test_the_model_that_comes_along_is_small_and_takes_other_flags(temperature, capsys):
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 3e6
    options = config.parse(GenerateOptions, "", ["--question", "1+1?", "--temperature", str(temperature), "--seed", "3"],
                           demo_defaults)
    assert (options.model, options.temperature, options.seed, options.style) == (str(DEMO_MODEL), temperature, 3, "base")
    assert "no --model" in capsys.readouterr().err
