"""Problems, trajectories and SFT records on disk: JSON lines in, JSON lines appended.

A file is read whole and checked line by line before anything is done with it: what is wrong is a ValueError that names
file and line. A file that a killed run was writing may end in half a line; that half is cut off before appending.
"""

import fcntl
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

from thor.template import THINK_OPENS, Template, encode_response
from thor.trajectory import ACT, Trajectory, from_json, to_json


@dataclass(frozen=True)
class Problem:
    """One question and its gold answer (None where nobody knows it); `extra` keeps the other fields of the line."""

    id: str
    question: str
    answer: str | None
    extra: dict[str, object] = field(default_factory=dict, compare=False)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of the non-blank lines, of a .gz too. ValueError for no file or bytes that are not UTF-8."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        for number, raw in enumerate(_whole(file, path), 1):
            try:
                line = raw.decode()
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not UTF-8") from None
            if line.strip():
                yield number, line


def _whole(file: BinaryIO, path: str | Path) -> Iterator[bytes]:
    """Its lines. ValueError for a .gz that is none, or only a part of one."""
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error})") from None


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", JSON object) of each line. ValueError for anything else, and for a file without any."""
    empty = True
    for number, line in read_lines(path):
        where, empty = f"{path}, line {number}", False
        try:
            record = json.loads(line)
            if "\\ud" in line.lower():
                json.dumps(record, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half of a surrogate pair, which is no text") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON object is expected")
        yield where, record
    if empty:
        raise ValueError(f"{path} is empty")


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSON-lines file with `id`, `question` and (or null) `answer`; ids must be unique."""
    problems: dict[str, Problem] = {}
    for where, record in read_records(path):
        problem = _problem(where, record)
        if problem.id in problems:
            raise ValueError(f"{where}: the id {problem.id!r} has been seen before")
        problems[problem.id] = problem
    return list(problems.values())


def _problem(where: str, record: dict) -> Problem:
    for name in ("id", "question"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise ValueError(f"{where}: a problem needs a non-empty string {name!r}")
    answer = record.get("answer")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(f"{where}: 'answer' must be a non-empty string, or null where there is none")
    extra = {name: value for name, value in record.items() if name not in ("id", "question", "answer")}
    return Problem(record["id"], record["question"], answer, extra)


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """The trajectories of a JSON-lines file; (id, sample) must be unique."""
    trajectories: dict[tuple[str, int], Trajectory] = {}
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            trajectory = from_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        key = (trajectory.id, trajectory.sample)
        if key in trajectories:
            raise ValueError(f"{where}: sample {key[1]} of problem {key[0]!r} has been seen before")
        trajectories[key] = trajectory
    return list(trajectories.values())


def open_to_append(path: str | Path) -> TextIO:
    """The file, ready for whole lines: half a line at its end, left by a killed run, is cut off first.

    ValueError if it cannot be written, or another process has it open: the half line may be what that one writes now.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target, "ab+")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, or its process has ended
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path} is being written by another process; wait for it, or name another --out") from None
    except OSError:
        pass  # a file system without locks: nobody can be kept away
    file.truncate(_end_of_last_line(file))
    return io.TextIOWrapper(file, encoding="utf-8")


def _end_of_last_line(file: BinaryIO) -> int:
    """The offset after the last newline, 0 where there is none."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0


def append_trajectory(file: TextIO, trajectory: Trajectory) -> None:
    """Write one line and hand it to the operating system, so that a killed process loses only what was in flight."""
    file.write(to_json(trajectory) + "\n")
    file.flush()


def read_sft(path: str | Path, template: Template) -> list[Trajectory]:
    """SFT data as trajectories with tokens and spans.

    A line is a trajectory as `generate.py` and `tirgen.py` write them, {"question", "response"}, or {"messages": […]} in
    chat style, of which only the last assistant turn is trained.
    """
    return [_sft_record(where, record, template) for where, record in read_records(path)]


def _sft_record(where: str, record: dict, template: Template) -> Trajectory:
    if "response_ids" in record:
        try:
            return from_json(json.dumps(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if isinstance(record.get("question"), str) and isinstance(record.get("response"), str):
        question, response = record["question"], record["response"]
        prompt = template.prompt_text(question)
    elif isinstance(record.get("messages"), list):
        question, response, prompt = _last_turn(where, record["messages"], template)
    else:
        raise ValueError(f"{where}: expected a trajectory, 'question' and 'response', or 'messages'")
    if not response.strip():
        raise ValueError(f"{where}: the response is empty")
    check_thinking(where, template, prompt, response)
    response = template.continued(prompt, response)
    ids, spans = encode_response(template, response)
    return Trajectory(
        id=str(record.get("id", where)), sample=0, question=question, answer=record.get("answer"),
        prompt_ids=template.encode_prompt(prompt), response_ids=ids, spans=spans,
        executions=[None for span in spans if span.kind == ACT], text=response, finish="eos",
        thinking=template.is_thinking(prompt))


def check_thinking(where: str, template: Template, prompt: str, response: str) -> None:
    """ValueError for a written response whose style is not the one that its prompt asks for."""
    if template.is_thinking(prompt) and "</think>" not in response:
        raise ValueError(f"{where}: the response closes no <think>, and a reasoning turn is asked for; leave --thinking off")
    if prompt.rstrip().endswith("</think>") and THINK_OPENS.match(response):
        raise ValueError(f"{where}: the response opens a <think> after a prompt in which thinking is off; use --thinking")


def _last_turn(where: str, messages: list, template: Template) -> tuple[str, str, str]:
    """(last user text, last assistant text, rendered prompt) of a chat record."""
    if template.style != "chat":
        raise ValueError(f"{where}: 'messages' need --style chat")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: each message needs a string 'role' and a string 'content'")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: 'messages' must end with an assistant turn that answers something")
    return messages[-2]["content"], messages[-1]["content"], template.render(messages[:-1])
