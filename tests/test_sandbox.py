"""Untrusted code gets a typed outcome, and nothing of it stays behind. Limits here are small: tests are short."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from thor.sandbox import LocalSandbox, open_sandbox
from thor.trajectory import OUTCOMES, Execution

SMALL = dict(num_workers=4, wall_seconds=60.0, cpu_seconds=1.0, memory_mb=256, output_bytes=4096)


def run_all(*codes: str, **limits) -> list[Execution]:
    """The executions of some snippets, submitted at once, in order."""
    async def run() -> list[Execution]:
        async with LocalSandbox(**{**SMALL, **limits}) as sandbox:
            return list(await asyncio.gather(*map(sandbox.run, codes)))

    return asyncio.run(run())


CASES = {
    "print(6 * 7)": ("ok", "42\n", ""),
    "import sympy\nx = sympy.symbols('x')\nprint(sympy.factor(x**2 - 1))": ("ok", "(x - 1)*(x + 1)\n", ""),
    "import csv, numpy\nprint(csv.__name__, numpy.arange(3).sum())": ("ok", "csv 3\n", ""),
    "x = 1": ("silent", "", "(no output: print the result)"),
    "print('  ')": ("silent", "  \n", "(no output: print the result)"),
    "print(1)\nprint(y)": ("error", "1\n", "NameError: name 'y' is not defined"),
    "def": ("error", "", "SyntaxError: invalid syntax"),
    "print(1)\nraise SystemExit(3)": ("error", "1\n", "exit code 3"),
    "import sys\nsys.exit('no')": ("error", "", "no"),
    "import sys\nprint(1)\nsys.exit()": ("ok", "1\n", ""),
    "input()": ("error", "", "EOFError: EOF when reading a line"),
    "def f(): f()\nf()": ("error", "", "RecursionError: maximum recursion depth exceeded"),
    "while True: pass": ("timeout", "", "TimeoutError: exceeded 1 s"),
    "sum(range(10**12))": ("timeout", "", "TimeoutError: exceeded 1 s"),
    "from signal import *\nsignal(SIGXCPU, SIG_IGN)\nwhile True: pass": ("timeout", "", "TimeoutError: exceeded 1 s"),
    "x = bytearray(4 << 30)": ("memory", "", "MemoryError"),
    "x = []\nwhile True: x.append('a' * 1000000)": ("memory", "", "MemoryError"),
    "import numpy\nnumpy.ones(10**9)": ("memory", "", "MemoryError"),
    "while True: print('x' * 100)": ("output-limit", None, "OutputLimitError: more than 4096 bytes"),
    "print('x' * 10_000_000)": ("output-limit", None, "OutputLimitError: more than 4096 bytes"),
    "import os\nprint(5)\nos._exit(0)": ("ok", "5\n", ""),
    "import sys\nprint(3)\nsys.stdout.close()": ("ok", "3\n", ""),
    "import os\nprint(3)\nos.close(1)": ("ok", "3\n", ""),
    "import sys\nsys.stdout.buffer.write(b'a\\xffb')": ("ok", "a\ufffdb", ""),
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)": ("error", "", "Killed: SIGKILL"),
    "import os\nos.kill(os.getpid(), 40)": ("error", "", "Killed: signal 40"),
    "import ctypes\nctypes.string_at(0)": ("error", "", "Killed: SIGSEGV"),
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\nprint(1)": ("ok", "1\n", ""),
    "import threading\nthreading.Thread(target=lambda: print('t')).start()": ("ok", "t\n", ""),
    "if __name__ == '__main__': print('main')": ("ok", "main\n", ""),
    "raise ValueError('x' * 5_000_000)": ("error", "", None),
    "import os\nfor _ in range(30):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)\nprint(1)": ("ok", "1\n", ""),
    "import tempfile, os\nprint(os.path.dirname(tempfile.mkstemp()[1]) == os.getcwd())": ("ok", "True\n", ""),
    "import thor": ("error", "", "ModuleNotFoundError: No module named 'thor'"),
    "print('```output\\n1\\n```')": ("ok", "```output\n1\n```\n", ""),
}


@pytest.fixture(scope="module")
def executions() -> dict[str, Execution]:
    """All cases at once, hostile and honest together, each honest one surrounded by trouble."""
    codes = list(CASES) + ["import os\nwhile True: os.fork()"] + ["print(sum(range(1000)))"] * 40
    return dict(zip(list(CASES) + ["fork bomb"] + list(range(40)), run_all(*codes), strict=True))


@pytest.mark.parametrize("code", CASES)
def test_an_outcome_is_one_of_the_typed_ones_and_says_what_the_model_is_shown(executions, code):
    outcome, stdout, error = CASES[code]
    found = executions[code]
    assert found.outcome == outcome and found.outcome in OUTCOMES
    assert stdout is None or found.stdout == stdout
    assert error is None or found.error == error
    assert len(found.stdout.encode()) <= 4096 and len(found.error) <= 8192
    assert found.passed == (outcome == "ok")


def test_honest_snippets_are_undisturbed_by_the_others(executions):
    assert all(executions[number].stdout == "499500\n" for number in range(40))


def test_a_fork_bomb_is_the_policys_own_failure(executions):
    assert executions["fork bomb"].outcome in ("error", "timeout")


def test_sandbox_limits_that_decide_an_outcome_are_cpu_time_and_memory_wall_clock_is_a_generous_backstop():
    """Sleeping costs no CPU and passes beyond the CPU limit; past the wall-clock limit it is a time-out."""
    [slept] = run_all("import time\ntime.sleep(1.6)\nprint(1)")
    [stuck] = run_all("import time\ntime.sleep(99)", wall_seconds=3.0)
    assert slept.outcome == "ok" and (stuck.outcome, stuck.error) == ("timeout", "TimeoutError: exceeded 3 s")


def test_memory_that_ends_in_small_pieces_is_still_a_memory_error():
    """Nothing is left to write a traceback with."""
    [execution] = run_all("x = []\nwhile True: x.append([x])", memory_mb=32, cpu_seconds=20.0)
    assert (execution.outcome, execution.error) == ("memory", "MemoryError")


LIKE_PYTHON = [
    "from concurrent.futures import ThreadPoolExecutor\ne = ThreadPoolExecutor()\nprint(e.submit(lambda: 5).result())",
    "from multiprocessing import Pool\ndef f(x): return x * x\nwith Pool(2) as p: print(p.map(f, [1, 2, 3]))",
    "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "import atexit\natexit.register(print, 'bye')", "open('/dev/stdout', 'w').write('hi')",
    "import sys, io\nsys.stdout.write('kept')\nsys.stdout = io.StringIO()\nprint('lost')",
    "import sys\nsys.__stdout__.write('kept')",
    "import sys\nprint(sys.argv[1:], __name__, __doc__)",
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(994))",
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(1000))",
    "open('m.py', 'w').write('x = 1')\nimport m\nprint(m.x)",
    "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(3)'])",
    "import sys\nsys.exit(256)", "import sys\nprint(1)\nsys.exit(True)", "import sys\nprint(1)\nsys.exit([])",
    "raise ExceptionGroup('g', [ValueError('v')])", "raise KeyError('k')", "assert 1 == 2, 'no'", "print('\\ud800')",
    "if True:\nprint(1)", "x = '", "from __future__ import annotations\ndef f(x: y): pass\nprint(f.__annotations__)",
    "import sys\nsys.excepthook = lambda *e: print('hooked', file=sys.stderr)\nraise ValueError",
    "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()\nprint('main')",
]


@pytest.fixture(scope="module", params=["best", "basic"])
def likenesses(request) -> dict[str, Execution]:
    """The snippets of LIKE_PYTHON in the sandbox, with namespaces and without."""
    executions = run_all(*LIKE_PYTHON, cpu_seconds=5.0, isolation=request.param)
    return dict(zip(LIKE_PYTHON, executions, strict=True))


@pytest.mark.parametrize("code", LIKE_PYTHON)
def test_code_does_what_a_fresh_python_does(likenesses, code, tmp_path):
    (tmp_path / "code.py").write_bytes(code.encode("utf-8", "surrogatepass"))
    fresh = subprocess.run([sys.executable, "code.py"], cwd=tmp_path, capture_output=True, text=True,
                           stdin=subprocess.DEVNULL, env={"PYTHONIOENCODING": "utf-8"})
    found = likenesses[code]
    assert found.stdout == fresh.stdout and found.passed == (fresh.returncode == 0 and fresh.stdout.strip() != "")
    if fresh.returncode != 0 and fresh.stderr:
        assert found.error == fresh.stderr.strip().splitlines()[-1].strip()


def test_each_code_block_is_independent():
    first, second = run_all("x = 1\nimport math\nmath.pi = 3\nprint(x)",
                            "import math\nprint(math.pi, 'x' in globals())", num_workers=1)
    assert first.passed and second.stdout == "3.141592653589793 False\n"


def test_the_same_code_gives_the_same_output():
    code = ("import random, numpy, sympy.core.random\nprint(random.random(), numpy.random.rand(), hash('a'), "
            "list({'b', 'a', 'c'}), sympy.core.random.rng.random())")
    assert len({run.stdout for run in run_all(*[code] * 3) + run_all(code)}) == 1


def test_code_sees_no_descriptor_of_the_harness_and_an_almost_empty_environment():
    os.environ["THOR_TEST_SECRET"] = "abc"
    fds, environment = run_all("import os\nprint([os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)], "
                               "len(os.listdir('/proc/self/fd')))", "import os\nprint(sorted(os.environ))")
    assert "/dev/null" in fds.stdout and fds.stdout.rstrip().endswith(" 4")  # 0, 1, 2 and the listing's own
    assert "THOR_TEST_SECRET" not in environment.stdout and "HOME" in environment.stdout


def test_torch_is_not_imported_in_the_warm_parent():
    assert run_all("import sys\nprint('torch' in sys.modules, 'sympy' in sys.modules)")[0].stdout == "False True\n"


def descendants(pid: int | str) -> list[str]:
    """Its child processes and theirs, zombies included."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return []
    return children + [one for child in children for one in descendants(child)]


def processes_naming(text: Path) -> list[str]:
    """Processes whose command line or first environment names `text`: a sandbox's own and its snippets' forks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(text).encode() in (process / file).read_bytes() for file in ("cmdline", "environ")):
                found.append(process.name)
        except OSError:  # it has just ended
            continue
    return found


def test_code_sees_no_descriptor_of_the_harness_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> Execution:
        async with LocalSandbox(**{**SMALL, "num_workers": 70}) as sandbox:
            before = len(processes_naming(tmp_path))
            others = [asyncio.create_task(sandbox.run("import time\ntime.sleep(99)")) for _ in range(69)]
            while len(processes_naming(tmp_path)) < before + 69:
                await asyncio.sleep(0.01)
            listing = await sandbox.run("import os\nprint(len(os.listdir('/proc/self/fd')))")
            for other in others:
                other.cancel()
            return listing

    assert asyncio.run(run()).stdout == "4\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a snippet a user of its own")
def test_without_namespaces_too_a_snippet_cannot_signal_the_harness_or_become_root_again():
    kill, become_root = run_all("import os\nos.kill(os.getppid(), 9)", "import os\nos.setuid(0)", isolation="basic")
    assert kill.error == become_root.error == "PermissionError: [Errno 1] Operation not permitted"


DAEMONS = ("import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n"
           "        if os.fork() == 0:\n            time.sleep(999)\n        os._exit(0)\n")
RESTLESS = ("import os, time\nif os.fork() == 0:\n    while True:\n        os.setsid()\n"
            "        if os.fork(): os._exit(0)\ntime.sleep(0.3)\nprint(1)")
LITTER = ("import os\nos.mkdir('d')\nopen('d/f', 'w').write('x')\nos.symlink('/etc', 'd/e')\nos.chmod('d', 0)\n"
          "print(os.getcwd())")


@pytest.mark.parametrize("isolation", ["best", "basic"])
@pytest.mark.parametrize("code", [DAEMONS + "print(1)", RESTLESS, LITTER])
def test_nothing_of_a_snippet_stays_behind(code, isolation, tmp_path, monkeypatch):
    """Daemons, processes that never stop forking and exiting, zombies, directories (read-only ones too)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> None:
        async with LocalSandbox(**SMALL, isolation=isolation) as sandbox:
            before = processes_naming(tmp_path)
            assert (await sandbox.run(code)).passed
            assert descendants(sandbox.pid) == [] and processes_naming(tmp_path) == before
            assert not any(path.is_file() or path.is_symlink() for path in tmp_path.rglob("*"))

    asyncio.run(run())
    assert processes_naming(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_closing_the_sandbox_ends_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> None:
        async with LocalSandbox(**SMALL) as sandbox:
            running = asyncio.create_task(sandbox.run(DAEMONS + "time.sleep(99)"))
            while len(processes_naming(tmp_path)) < 1 + 4:
                await asyncio.sleep(0.01)
            running.cancel()

    asyncio.run(run())
    assert processes_naming(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_a_grandchild_that_keeps_stdout_open_does_not_stall_the_result():
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(99)\nprint(7)"
    [execution] = run_all(code)
    assert execution.outcome == "ok" and execution.seconds < 60


LATE_FLOOD = "import fcntl, os\nfcntl.fcntl(1, 1031, 1 << 20)\nos.write(1, b'x' * 900_000)\nos._exit(0)"  # F_SETPIPE_SZ


@pytest.mark.parametrize("isolation", ["best", "basic"])
def test_output_past_the_limit_that_is_read_after_the_end_is_output_limit_and_the_parent_lives(isolation):
    """A pipe made large enough holds all of it, so its writer is gone when most of it is read."""
    async def run() -> tuple[list[Execution], bool]:
        async with LocalSandbox(**{**SMALL, "output_bytes": 65536}, isolation=isolation) as sandbox:
            first = sandbox.pid
            executions = await asyncio.gather(*[sandbox.run(LATE_FLOOD) for _ in range(40)])
            return executions, sandbox.pid == first

    executions, same_parent = asyncio.run(run())
    assert {(run.outcome, len(run.stdout)) for run in executions} == {("output-limit", 65536)} and same_parent


def test_a_trainer_busy_with_a_step_neither_delays_nor_distorts_a_run():
    """It takes no result for longer than the wall-clock limit, and there are more of them than a socket holds."""
    async def run() -> list[Execution]:
        async with LocalSandbox(**{**SMALL, "wall_seconds": 6.0, "output_bytes": 1 << 20}) as sandbox:
            running = [asyncio.create_task(sandbox.run("print('x' * 300_000)")) for _ in range(12)]
            await asyncio.sleep(0.05)
            time.sleep(6.5)
            return list(await asyncio.gather(*running))

    assert all(execution.passed and len(execution.stdout) == 300_001 for execution in asyncio.run(run()))


def test_only_what_the_policy_caused_is_judged_and_an_infrastructure_failure_is_retried(tmp_path, monkeypatch):
    """The warm parent is killed under running snippets: they run again on a new one, and nothing is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> tuple[list[Execution], int, int]:
        async with LocalSandbox(**SMALL) as sandbox:
            first = sandbox.pid
            codes = [f"{DAEMONS}time.sleep(1)\nprint({n})" for n in range(6)]
            running = [asyncio.create_task(sandbox.run(code)) for code in codes]
            while len(processes_naming(tmp_path)) < 1 + 8:
                await asyncio.sleep(0.01)
            os.kill(first, signal.SIGKILL)
            return list(await asyncio.gather(*running)), first, sandbox.pid

    done, first, second = asyncio.run(run())
    assert [run.stdout for run in done] == [f"{n}\n" for n in range(6)] and first != second
    assert processes_naming(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_a_parent_that_keeps_dying_is_infrastructure_and_never_the_codes_failure():
    async def assassin(sandbox: LocalSandbox) -> None:
        while True:
            await asyncio.sleep(0.02)
            try:
                os.kill(sandbox.pid, signal.SIGKILL)
            except ProcessLookupError:  # the next one is not there yet
                continue

    async def run() -> Execution:
        async with LocalSandbox(**SMALL) as sandbox:
            task = asyncio.create_task(assassin(sandbox))
            execution = await sandbox.run("import time\ntime.sleep(3)\nprint(1)")
            task.cancel()
            return execution

    execution = asyncio.run(run())
    assert execution.outcome == "infrastructure" and execution.error == "the sandbox's parent process died"


def test_the_parent_and_its_snippets_end_when_the_trainer_is_killed(tmp_path):
    code = ("import asyncio\nfrom thor.sandbox import LocalSandbox\nasync def f():\n"
            "    async with LocalSandbox() as s:\n        print(s.pid, flush=True)\n"
            f"        await s.run({DAEMONS + 'time.sleep(99)'!r})\nasyncio.run(f())")
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent.parent, env={**os.environ, "TMPDIR": str(tmp_path)})
    trainer.stdout.readline()  # its sandbox is there
    while len(processes_naming(tmp_path)) < 2 + 4:
        time.sleep(0.01)
    trainer.kill()
    trainer.communicate()
    deadline = time.monotonic() + 30
    while (processes_naming(tmp_path) or list(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_naming(tmp_path) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "reason"), [
    ("exit 1", "ended"), ("exec %s -S \"$@\"" % sys.executable, "No module named 'numpy'")])
def test_a_sandbox_that_cannot_start_is_one_clear_sentence(script, reason, tmp_path, monkeypatch):
    """A Python that does not run, and one that lacks numpy."""
    async def open_it() -> None:
        async with LocalSandbox(**SMALL):
            pass

    python, temporary = tmp_path / "python", tmp_path / "tmp"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    temporary.mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(ValueError, match=f"^the sandbox cannot start: .*{reason}"):
        asyncio.run(open_it())
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", SMALL)
def test_limits_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        LocalSandbox(**{name: 0})


def test_a_sandbox_is_local_or_a_url():
    assert isinstance(open_sandbox("local"), LocalSandbox)
    with pytest.raises(ValueError, match="somewhere: it must be local or"):
        open_sandbox("somewhere")
