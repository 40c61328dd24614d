"""The log of executions: what was run can be had again without a sandbox, and never that of another snippet."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from thor.sandbox import open_sandbox
from thor.sandbox_log import LoggedSandbox, is_steady
from thor.trajectory import Execution

ROOT = Path(__file__).parent.parent
LIMITS = {"cpu_seconds": 1.0}


class Counting:
    """A sandbox that prints how often it has run anything, or gives scripted outcomes."""

    def __init__(self, *outcomes: str):
        self.outcomes, self.num_runs = list(outcomes), 0

    async def __aenter__(self) -> "Counting":
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def run(self, code: str) -> Execution:
        self.num_runs += 1
        return Execution(self.outcomes.pop(0) if self.outcomes else "ok", f"{self.num_runs} \u00e4\n", "", 0.1)


def run_all(sandbox: Counting | None, path, mode: str, *codes: str, limits=LIMITS) -> list[str]:
    """What some snippets print, one after the other."""
    async def run() -> list[str]:
        async with LoggedSandbox(sandbox, str(path), mode, limits) as logged:
            return [(await logged.run(code)).stdout.split()[0] for code in codes]

    return asyncio.run(run())


def test_what_was_recorded_is_replayed_without_a_sandbox_in_the_order_of_each_snippet(tmp_path):
    path = tmp_path / "log"
    assert run_all(Counting(), path, "record", "a", "b", "a", "a") == ["1", "2", "3", "4"]
    assert run_all(None, path, "replay", "b", "a", "a", "b", "a", "a") == ["2", "1", "3", "2", "4", "4"]


def test_a_log_is_only_appended_to(tmp_path):
    path = tmp_path / "log"
    run_all(Counting(), path, "record", "a")
    first = path.read_bytes()
    run_all(Counting(), path, "record", "a")
    assert path.read_bytes().startswith(first) and len(path.read_text().splitlines()) == 2
    assert set(json.loads(first)) == {"key", "outcome", "stdout", "error", "seconds"}


def test_code_that_is_not_in_the_log_is_a_clear_error_and_so_is_code_under_other_limits(tmp_path):
    path = tmp_path / "log"
    run_all(Counting(), path, "record", "print(1)")
    for code, limits in (("print(2)", LIMITS), ("print(1)", {"cpu_seconds": 2.0})):
        with pytest.raises(ValueError, match=r"log has no execution of this code under these limits: 'print\(\d\)'"):
            run_all(None, path, "replay", code, limits=limits)


def test_a_killed_writers_half_line_is_ignored_and_cut_before_more_is_written(tmp_path):
    path = tmp_path / "log"
    run_all(Counting(), path, "record", "a", "b")
    path.write_bytes(path.read_bytes()[:-9])
    assert run_all(None, path, "replay", "a") == ["1"]
    run_all(Counting(), path, "record", "c")
    assert run_all(None, path, "replay", "a", "c") == ["1", "1"]


def test_a_file_that_is_no_log_is_not_cut_and_a_log_that_is_not_there_is_not_replayed(tmp_path):
    path = tmp_path / "log"
    with pytest.raises(ValueError, match="log does not exist, so there is nothing to replay"):
        run_all(None, path, "replay", "a")
    path.write_text("notes\nwithout a newline at their end")
    with pytest.raises(ValueError, match="log ends in something else than an execution"):
        run_all(Counting(), path, "record", "a")
    assert path.read_text() == "notes\nwithout a newline at their end"
    with pytest.raises(ValueError, match="--sandbox_log_mode replay needs --sandbox_log"):
        open_sandbox("local", log_mode="replay")


def test_an_infrastructure_failure_is_not_in_the_log(tmp_path):
    path = tmp_path / "log"
    run_all(Counting("infrastructure", "ok"), path, "record", "a", "a")
    assert run_all(None, path, "replay", "a", "a") == ["2", "2"]


def test_a_cache_runs_what_is_steady_once_and_remembers_it_over_runs(tmp_path):
    path, first, second = tmp_path / "log", Counting(), Counting()
    assert run_all(first, path, "cache", "print(1)", "print(1)", "import time", "import time") == ["1", "1", "2", "3"]
    assert run_all(second, path, "cache", "print(1)", "print(2)", "import time") == ["1", "1", "2"]
    assert (first.num_runs, second.num_runs) == (3, 2)


@pytest.mark.parametrize("outcome", ["timeout", "memory", "output-limit"])
def test_an_outcome_that_depends_on_the_machine_is_never_cached(outcome, tmp_path):
    sandbox = Counting(outcome)
    assert run_all(sandbox, tmp_path / "log", "cache", "print(1)", "print(1)", "print(1)") == ["1", "2", "2"]


@pytest.mark.parametrize(("code", "steady"), [
    ("import sympy, random\nprint(sympy.factor(4), random.random())", True), ("print(", True), ("x = 1 / 0", True),
    ("import time", False), ("import os.path", False), ("from datetime import date", False),
    ("def f():\n    import uuid", False), ("print(object())", False), ("print(id(1))", False),
    ("exec('import time')", False), ("print(open('/proc/stat'))", False),
    ("import random\nrandom.seed()", False), ("import random\nrandom.seed(7)", True),
    ("import numpy as np\nprint(np.random.default_rng().random())", False),
    ("import numpy as np\nprint(np.random.default_rng(7).random())", True),
    ("from random import SystemRandom\nprint(SystemRandom().random())", False),
    ("import random\nprint(random.SystemRandom().random())", False),
])
def test_code_is_steady_unless_it_can_see_the_time_the_machine_or_addresses(code, steady):
    assert is_steady(code, Execution("ok", "", "", 0.0)) == steady


def test_an_address_in_what_was_printed_is_not_steady_either():
    code = "print(map(int, '12'))"
    assert not is_steady(code, Execution("ok", "<map object at 0x7f0c8a1b2c30>\n", "", 0.0))
    assert is_steady("print(hex(255))", Execution("ok", "0xff\n", "", 0.0))


FULL_DISK = """
import asyncio, resource, sys
sys.path.insert(0, "tests")
from test_sandbox_log import Counting, LIMITS
from thor.sandbox_log import LoggedSandbox

async def run(path):
    async with LoggedSandbox(Counting(), path, "record", LIMITS) as logged:
        await logged.run("a")
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # Python ignores its signal, so a write ends there
        await logged.run("b")

asyncio.run(run(sys.argv[1]))
"""


def test_a_line_that_a_full_disk_took_a_part_of_ends_the_run_and_is_cut_off_by_the_next(tmp_path):
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], cwd=ROOT, capture_output=True, text=True)
    assert path.stat().st_size == 200 and done.stderr.endswith("no room for a whole line; the disk is full\n")
    run_all(Counting(), path, "record", "c")
    assert run_all(None, path, "replay", "a", "c") == ["1", "1"]


@pytest.mark.parametrize("line", ["{}", "[1]", "5", "{\"key\": \"a\"}", "nonsense"])
def test_a_file_that_is_no_log_is_refused_by_its_line(line, tmp_path):
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(ValueError, match="log, line 1, is not an execution"):
        run_all(None, tmp_path / "log", "replay", "a")


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mode of the sandbox's log is 'r'; it must be one of record, replay, cache"):
        LoggedSandbox(Counting(), str(tmp_path / "log"), "r", LIMITS)


def test_the_local_sandbox_is_recorded_and_replayed(tmp_path):
    async def run(mode: str) -> Execution:
        async with open_sandbox("local", 1.0, log=str(tmp_path / "log"), log_mode=mode) as sandbox:
            return await sandbox.run("print(6 * 7)")

    recorded = asyncio.run(run("record"))
    assert recorded.stdout == "42\n" and asyncio.run(run("replay")) == recorded
