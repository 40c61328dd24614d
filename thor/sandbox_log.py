"""A log of executions beside a sandbox: written as they come, or answered from, to do a run again without running code.

One line of JSON an execution: {"key", "outcome", "stdout", "error", "seconds"}; the key is a hash of the code and its
limits, so an answer is never that of another snippet or of other limits. Invariants: the file is only ever appended to,
but for half a line that a killed writer left; what is `infrastructure` is not in it.
"""

import ast
import errno
import hashlib
import json
import os
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from thor.trajectory import Execution

MODES = ("record", "replay", "cache")
ENTRY = b'{"key": "'  # begins every line
# Code that imports one of these may print something else the next time.
UNSTEADY = {"time", "datetime", "os", "secrets", "uuid", "subprocess", "multiprocessing", "threading", "concurrent",
            "asyncio", "socket", "tempfile", "ctypes", "signal", "gc", "psutil", "platform", "timeit", "resource"}
UNSTEADY_NAMES = {"id", "object", "open", "exec", "eval", "__import__", "hash", "SystemRandom"}
SEEDS = {"seed", "Random", "RandomState", "default_rng"}  # called without a seed, they ask the system for one
ADDRESS = re.compile(r"\b0x[0-9a-f]{9,}")  # as in <function <lambda> at 0x7f0c8a1b2c30>
STEADY_OUTCOMES = ("ok", "silent", "error")  # the others depend on the machine


class Sandbox(Protocol):
    """What is logged: LocalSandbox, RemoteSandbox."""

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def run(self, code: str) -> Execution: ...


class LoggedSandbox:
    """A sandbox with a log at `path`. `limits`: what decides outcomes beside the code, part of the key.

    record: everything is run, and logged. replay: nothing is run, the n-th request for a snippet gets its n-th result
    in the log (the last one from then on); one that is not there is a ValueError. cache: as record, but a snippet that
    gives the same result each time, by its imports and names, is run once.
    """

    def __init__(self, sandbox: Sandbox, path: str, mode: str, limits: dict[str, float]):
        if mode not in MODES:
            raise ValueError(f"the mode of the sandbox's log is {mode!r}; it must be one of {', '.join(MODES)}")
        self.sandbox, self.path, self.mode, self.limits = sandbox, Path(path), mode, limits
        self._known: dict[str, list[Execution]] = defaultdict(list)
        self._asked: dict[str, int] = defaultdict(int)
        self._file = -1

    async def __aenter__(self) -> "LoggedSandbox":
        if self.mode == "replay":
            if not self.path.is_file():
                raise ValueError(f"{self.path} does not exist, so there is nothing to replay")
            self._known.update(read_log(self.path))
            return self
        cut_half_line(self.path)
        if self.mode == "cache":
            self._known.update(read_log(self.path))
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            await self.sandbox.__aenter__()
        except BaseException:
            os.close(self._file)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.mode != "replay":
            await self.sandbox.__aexit__(*error)
            os.close(self._file)

    async def run(self, code: str) -> Execution:
        """Run one snippet, or find what it gave."""
        key = hashlib.sha256(json.dumps([self.limits, code], sort_keys=True).encode()).hexdigest()
        known = self._known.get(key)
        if self.mode == "replay":
            if known is None:
                raise ValueError(f"{self.path} has no execution of this code under these limits: {code[:200]!r}")
            self._asked[key] += 1
            return known[min(self._asked[key], len(known)) - 1]
        if self.mode == "cache" and known is not None and is_steady(code, known[-1]):
            return known[-1]
        execution = await self.sandbox.run(code)
        if execution.outcome != "infrastructure":
            line = (json.dumps({"key": key, **asdict(execution)}) + "\n").encode()
            if os.write(self._file, line) < len(line):  # one call: lines of several writers do not mix
                raise OSError(errno.ENOSPC, f"{self.path} has no room for a whole line; the disk is full")
            if self.mode == "cache":
                self._known[key] = [execution]
        return execution


def read_log(path: Path) -> dict[str, list[Execution]]:
    """Executions by key, in the order of the log; half a line at its end is left out. ValueError for what is no log."""
    found: dict[str, list[Execution]] = defaultdict(list)
    for number, line in enumerate(path.read_text().splitlines(keepends=True) if path.exists() else [], 1):
        try:
            entry = json.loads(line) if line.endswith("\n") else None
            if entry is not None:
                found[entry.pop("key")].append(Execution(**entry))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}, is not an execution of a sandbox's log") from None
    return found


def cut_half_line(path: Path) -> None:
    """Remove what a killed writer left after the last whole line. ValueError if that is not the beginning of an entry."""
    if path.exists():
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if data[end:end + len(ENTRY)] != ENTRY[:len(data) - end]:
            raise ValueError(f"{path} ends in something else than an execution of a sandbox's log; name another file")
        if end < len(data):
            os.truncate(path, end)


def is_steady(code: str, last: Execution) -> bool:
    """Whether the code gives this result each time: by the result itself, and by what the code imports and names."""
    if last.outcome not in STEADY_OUTCOMES or ADDRESS.search(last.stdout + last.error):
        return False
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True  # nor will it next time
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in UNSTEADY for alias in node.names):
            return False
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSTEADY:
            return False
        if _name(node) in UNSTEADY_NAMES:
            return False
        if isinstance(node, ast.Call) and _name(node.func) in SEEDS and not node.args and not node.keywords:
            return False
    return True


def _name(node: ast.AST) -> str | None:
    """The last part of a name: of random.seed, seed."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
