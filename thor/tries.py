"""TIRGen's directory on disk: tries.jsonl with one line for each finished try, difficulty.jsonl, and settings.json.

A line of tries.jsonl is a trajectory, or says why a try was dropped. Invariants: lines are only appended, each with one
write, so a run that is killed loses what was in flight and the same command continues it; a try counts once, unless a
server or the sandbox lost it, which is nobody's doing: then it is made again and the later line stands.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from thor.checkpoint import Settings, differences, read_settings, write_aside
from thor.data import Problem, open_to_append, read_lines, read_records
from thor.trajectory import Trajectory, from_json

TRIES, DIFFICULTY, SETTINGS = "tries.jsonl", "difficulty.jsonl", "settings.json"

LOST = ("endpoint", "sandbox")  # reasons that are neither the Actor's nor the Critic's doing

Key = tuple[str, int]


@dataclass(frozen=True)
class Try:
    """What became of one try of one problem: a trajectory, or the reason it was dropped with the text so far.

    `critic` counts what the Critic was asked and which of its answers were refused.
    """

    id: str
    sample: int
    trajectory: Trajectory | None
    reason: str | None = None
    detail: str = ""
    text: str = ""
    critic: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Problem and number of the try."""
        return self.id, self.sample

    @property
    def right(self) -> bool:
        """Whether it came to the right answer."""
        return self.trajectory is not None and self.trajectory.correct is True

    def to_json(self) -> str:
        """One line, without the newline; that of a trajectory is a trajectory's with one field more."""
        fields = asdict(self)
        whole = fields.pop("trajectory")
        record = fields if whole is None else whole | {"critic": self.critic}
        return json.dumps(record, ensure_ascii=False, allow_nan=False)


def read_tries(directory: Path) -> dict[Key, Try]:
    """The tries of a directory by (problem id, number), in the file's order. ValueError for one that is there twice."""
    tries: dict[Key, Try] = {}
    path = directory / TRIES
    for number, line in read_lines(path):
        each = _try(f"{path}, line {number}", line)
        if each.key in tries and tries[each.key].reason not in LOST:
            raise ValueError(f"{path}, line {number}: try {each.sample} of problem {each.id!r} has been seen before")
        tries[each.key] = each
    return tries


def _try(where: str, line: str) -> Try:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("reason"), str):
            return Try(record["id"], record["sample"], None, record["reason"], record["detail"], record["text"],
                       record["critic"])
        trajectory = from_json(line)
        return Try(trajectory.id, trajectory.sample, trajectory, critic=record.get("critic", {}))
    except KeyError as error:
        raise ValueError(f"{where}: not a try, no field {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def is_missing(each: Try | None) -> bool:
    """Whether a try is still to be made: there is none yet, or it was lost."""
    return each is None or each.reason in LOST


def append_try(file: TextIO, each: Try) -> None:
    """Write one line and hand it to the operating system."""
    file.write(each.to_json() + "\n")
    file.flush()


def begin_or_continue(directory: Path, settings: Settings, problems: list[Problem]) -> dict[Key, Try]:
    """The tries that a directory holds. Refuses to mix two settings, or tries of other problems, into one directory."""
    cut_half_lines(directory)
    if (directory / TRIES).stat().st_size:
        check_settings(directory, settings)
    else:
        write_aside(directory / SETTINGS, json.dumps(settings, indent=2) + "\n")
    tries = read_tries(directory)
    check_problems(directory, tries.values(), problems)
    return tries


def cut_half_lines(directory: Path) -> None:
    """Cut off what a killed run left at the ends of its files; files that are missing begin empty."""
    for name in (TRIES, DIFFICULTY):
        open_to_append(directory / name).close()


def check_settings(directory: Path, settings: Settings) -> None:
    """Raise ValueError that names in what the tries of a directory were made otherwise."""
    if differing := differences(read_settings(directory / SETTINGS), settings, settings):
        raise ValueError(f"{directory} was begun with other settings ({differing}); use another directory")


def check_problems(directory: Path, tries: Iterable[Try], problems: list[Problem]) -> None:
    """Raise ValueError for a try of a problem that is not asked for, or whose question is another one."""
    questions = {problem.id: (problem.question, problem.answer) for problem in problems}
    for each in tries:
        whole = each.trajectory
        if each.id not in questions or whole and (whole.question, whole.answer) != questions[each.id]:
            raise ValueError(f"{directory} holds a try of another problem {each.id!r} than is asked for; use another "
                             "directory")


def merge(directories: list[Path], target: Path, settings: Settings, problems: list[Problem]) -> None:
    """Put the tries and the difficulties of several directories, as `--shard` makes them, together in `target`.

    ValueError for a try that two of them hold, for other settings than the command's, and for a target with tries.
    """
    if (target / TRIES).exists():
        raise ValueError(f"{target} holds tries already; merge into a new directory")
    merged: dict[Key, Try] = {}
    difficulty: dict[str, tuple[int, int]] = {}
    for directory in directories:
        check_settings(directory, settings)
        tries = read_tries(directory)
        check_problems(directory, tries.values(), problems)
        both = merged.keys() & tries.keys()
        if both:
            problem, number = min(both)
            raise ValueError(f"{directory}: try {number} of problem {problem!r} is in another directory, too; shards "
                             "do not overlap")
        merged |= tries
        difficulty |= read_difficulty(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_aside(target / SETTINGS, json.dumps(settings, indent=2) + "\n")
    write_lines(target / DIFFICULTY, (difficulty_line(name, *counts) for name, counts in difficulty.items()))
    write_lines(target / TRIES, (each.to_json() for each in merged.values()))


def read_difficulty(directory: Path) -> dict[str, tuple[int, int]]:
    """Problem id -> (solved, drawn) samples of plain chain of thought, for the problems that were measured."""
    path = directory / DIFFICULTY
    if not path.is_file() or not path.stat().st_size:
        return {}
    try:
        return {record["id"]: (record["solved"], record["drawn"]) for _, record in read_records(path)}
    except KeyError as error:
        raise ValueError(f"{path}: a line has no field {error}") from None


def difficulty_line(problem_id: str, solved: int, drawn: int) -> str:
    """One line of difficulty.jsonl, without the newline."""
    return json.dumps({"id": problem_id, "solved": solved, "drawn": drawn}, ensure_ascii=False)


def write_lines(path: Path, lines: Iterable[str] | Iterator[str]) -> None:
    """Write a whole file aside and rename it, so that it holds all lines or is what it was."""
    aside = path.with_name(path.name + ".aside")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
