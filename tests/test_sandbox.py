"""Untrusted code gets a typed outcome, and nothing of it stays behind. Limits here are small so that tests are short."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thor.sandbox import LocalSandbox, open_sandbox
from thor.trajectory import OUTCOMES, Execution

SMALL = dict(num_workers=4, wall_seconds=6.0, cpu_seconds=1.0, memory_mb=256, output_bytes=4096)


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
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass": ("timeout", "", "TimeoutError: exceeded 1 s"),
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
    "import ctypes\nctypes.string_at(0)": ("error", "", "Killed: SIGSEGV"),
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\nprint(1)": ("ok", "1\n", ""),
    "import threading\nthreading.Thread(target=lambda: print('t')).start()": ("ok", "t\n", ""),
    "if __name__ == '__main__': print('main')": ("ok", "main\n", ""),
    "raise ValueError('x' * 5_000_000)": ("error", "", None),
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


def test_limits_that_decide_an_outcome_are_cpu_time_and_memory_and_wall_clock_is_a_backstop():
    """Sleeping costs no CPU and passes beyond the CPU limit; past the wall-clock limit it is a time-out."""
    slept, stuck = run_all("import time\ntime.sleep(1.6)\nprint(1)", "import time\ntime.sleep(99)", wall_seconds=3.0)
    assert slept.outcome == "ok" and (stuck.outcome, stuck.error) == ("timeout", "TimeoutError: exceeded 3 s")


def test_each_code_block_is_independent():
    first, second = run_all("x = 1\nimport math\nmath.pi = 3\nprint(x)", "import math\nprint(math.pi, 'x' in globals())",
                            num_workers=1)
    assert first.passed and second.stdout == "3.141592653589793 False\n"


def test_the_same_code_gives_the_same_output():
    code = ("import random, numpy\nprint(random.random(), numpy.random.rand(), hash('a'), "
            "list({'b', 'a', 'c'}))")
    assert len({run.stdout for run in run_all(*[code] * 3) + run_all(code)}) == 1


def test_code_sees_no_descriptor_of_the_harness_and_an_almost_empty_environment():
    os.environ["THOR_TEST_SECRET"] = "abc"
    fds, environment = run_all("import os\nprint([os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)], "
                               "len(os.listdir('/proc/self/fd')))", "import os\nprint(sorted(os.environ))")
    assert "/dev/null" in fds.stdout and fds.stdout.rstrip().endswith(" 4")  # 0, 1, 2 and the listing's own
    assert "THOR_TEST_SECRET" not in environment.stdout and "HOME" in environment.stdout


def test_torch_is_not_imported_in_the_warm_parent():
    assert run_all("import sys\nprint('torch' in sys.modules, 'sympy' in sys.modules)")[0].stdout == "False True\n"


def descendants(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in children}.union(*(descendants(int(child)) for child in children))


def test_nothing_of_a_snippet_stays_behind():
    """Daemons, zombies, directories (read-only ones too) and the parent itself are gone."""
    daemon = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n" \
             "            time.sleep(999)\n        os._exit(0)\nprint(os.getcwd())"
    litter = "import os\nos.mkdir('d')\nopen('d/f', 'w').write('x')\nos.chmod('d', 0)\nprint(os.getcwd())"

    async def run() -> tuple[list[Execution], set[int], int]:
        async with LocalSandbox(**SMALL) as sandbox:
            done = [await sandbox.run(code) for code in (daemon, litter)]
            return done, descendants(sandbox.pid), sandbox.pid

    done, left, parent = asyncio.run(run())
    assert all(run.passed for run in done) and left == set()
    assert not any(Path(run.stdout.strip()).exists() for run in done)
    assert not Path(f"/proc/{parent}").exists()


def test_a_grandchild_that_keeps_stdout_open_does_not_stall_the_result():
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(99)\nprint(7)"
    [execution] = run_all(code)
    assert execution.outcome == "ok" and execution.seconds < 5


def test_only_what_the_policy_caused_is_judged():
    """The warm parent is killed under running snippets: they run again on a new one, and nobody is blamed."""
    async def run() -> tuple[list[Execution], int, int]:
        async with LocalSandbox(**SMALL) as sandbox:
            first = sandbox.pid
            running = [asyncio.create_task(sandbox.run(f"import time\ntime.sleep(0.5)\nprint({n})")) for n in range(6)]
            await asyncio.sleep(0.3)
            os.kill(first, signal.SIGKILL)
            return list(await asyncio.gather(*running)), first, sandbox.pid

    done, first, second = asyncio.run(run())
    assert [run.stdout for run in done] == [f"{n}\n" for n in range(6)] and first != second


def test_a_parent_that_keeps_dying_is_infrastructure_and_never_the_codes_failure():
    async def run() -> Execution:
        async with LocalSandbox(**SMALL) as sandbox:
            async def assassin() -> None:
                while True:
                    await asyncio.sleep(0.02)
                    if sandbox._process is not None:
                        sandbox._process.kill()
            task = asyncio.create_task(assassin())
            execution = await sandbox.run("import time\ntime.sleep(3)\nprint(1)")
            task.cancel()
            return execution

    assert asyncio.run(run()).outcome == "infrastructure"


def test_the_parent_ends_when_the_trainer_is_killed(tmp_path):
    code = ("import asyncio\nfrom thor.sandbox import LocalSandbox\nasync def f():\n    async with LocalSandbox() as s:\n"
            "        print(s.pid, flush=True)\n        await s.run('import time; time.sleep(50)')\nasyncio.run(f())")
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent.parent)
    parent = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{parent}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{parent}").exists()


def test_a_sandbox_that_cannot_start_is_one_clear_error(monkeypatch):
    async def open_it() -> None:
        async with LocalSandbox(**SMALL):
            pass

    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ValueError, match="the sandbox cannot start"):
        asyncio.run(open_it())


@pytest.mark.parametrize("name", SMALL)
def test_limits_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        LocalSandbox(**{name: 0})


def test_a_sandbox_url_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="over HTTP"):
        open_sandbox("http://127.0.0.1:8080")
