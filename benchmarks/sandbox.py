"""CPU time of one execution: the local sandbox against a fresh `python -c`, interleaved in one run; and a soak.

    python benchmarks/sandbox.py                     CPU time, and the latency of eight at a time
    python benchmarks/sandbox.py --soak 100000       does it stay as fast, and as small, with a tenth of it hostile?

CPU time is user plus system time of all processes involved: the warm parent with its reaped children (from /proc) and
this process for the sandbox, the children of this process for `python -c`.
"""

import asyncio
import operator
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.config import option  # noqa: E402
from thor.sandbox import LocalSandbox  # noqa: E402

SNIPPETS = {
    "sympy.factor": "import sympy\nx = sympy.symbols('x')\nprint(sympy.factor(x**4 - 5*x**2 + 4))",
    "print(1)": "print(1)",
}

HOSTILE = [  # code, outcomes it may have: what costs little CPU time, for the others a soak would last days
    ("import os, signal\nfor _ in range(10):\n    if os.fork() == 0: signal.pause()\nprint(1)", "ok"),
    ("import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(999)\n"
     "print(1)", "ok"),
    ("print('x' * 3_000_000)", "output-limit"), ("x = bytearray(8 << 30)", "memory"),
    ("import os\nos.abort()", "error"), ("import os\nprint(1)\nos.close(1)", "ok"),
    ("import os\nos._exit(0)", "silent"), ("open('f', 'wb').truncate(1 << 40)", "error"),
    ("for n in range(500): open(str(n), 'w').write('x' * 5000)\nprint(1)", "ok"),
    ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "error"),
    ("raise ValueError('x' * 5_000_000)", "error"),
    ("import subprocess\nsubprocess.Popen(['sleep', '999'], start_new_session=True)\nprint(1)", "ok"),
    ("import os, signal\nfor p in range(1, 99):\n    try: os.kill(p, signal.SIGKILL)\n    except OSError: pass",
     "error"),
]
PARTS = 10  # of a soak, each with a line of its own


@dataclass
class Options:
    """One flag a field."""

    rounds: int = option(10, "times that each side is measured, interleaved")
    per_round: int = option(20, "executions in the sandbox a round; python -c runs once for every five of them")
    soak: int = option(0, "executions of a soak, which is then all that is done; 100000 is the full one")
    sandbox_require: str = option("best", "best, strict or basic isolation")


def main(options: Options) -> None:
    """Print one line a snippet."""
    print(f"python {platform.python_version()}")
    asyncio.run(soak(options) if options.soak else measure(options))


async def measure(options: Options) -> None:
    """Interleave both sides for each snippet; then eight at a time."""
    async with LocalSandbox(num_workers=1, isolation=options.sandbox_require) as sandbox:
        for name, code in SNIPPETS.items():
            ours = fresh = 0.0
            for _ in range(options.rounds):
                ours += await sandbox_seconds(sandbox, code, options.per_round)
                fresh += fresh_seconds(code, max(1, options.per_round // 5))
            ours, fresh = ours / options.rounds, fresh / options.rounds
            print(f"{name}: sandbox {1e3 * ours:.1f} ms, python -c {1e3 * fresh:.1f} ms of CPU time, "
                  f"{fresh / ours:.1f} times less", flush=True)
    async with LocalSandbox(num_workers=8, isolation=options.sandbox_require) as sandbox:
        seconds = await latencies(sandbox, SNIPPETS["sympy.factor"], 8, 400)
    percentiles = statistics.quantiles(seconds, n=20)
    print(f"sympy.factor, 8 at a time: p50 {1e3 * percentiles[9]:.0f} ms, p95 {1e3 * percentiles[18]:.0f} ms, "
          f"p95 = {percentiles[18] / percentiles[9]:.1f} p50")


async def latencies(sandbox: LocalSandbox, code: str, at_once: int, count: int) -> list[float]:
    """Seconds from request to result of each of `count` executions, `at_once` of them under way."""
    seconds: list[float] = []

    async def one_after_another() -> None:
        while len(seconds) < count:
            started = time.perf_counter()
            assert (await sandbox.run(code)).passed, "the snippet must run"
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return seconds


async def soak(options: Options) -> None:
    """Many executions in one process, the parent killed once; a line for each part. Every result is checked."""
    async with LocalSandbox(num_workers=8, wall_seconds=600, cpu_seconds=5, memory_mb=256,
                            isolation=options.sandbox_require) as sandbox:  # so long: the machine may be busy
        print("part  executions/s  CPU ms each  memory here, MB  memory of the parent, MB  descriptors here, of it")
        for part in range(PARTS):
            numbers = iter(range(part * options.soak // PARTS, (part + 1) * options.soak // PARTS))
            count, started, before = len(range(options.soak // PARTS)), time.perf_counter(), busy_seconds(sandbox)
            killing = asyncio.create_task(kill_parent(sandbox, part == PARTS // 2, numbers, options.soak))
            await asyncio.gather(*(execute(sandbox, numbers) for _ in range(8)))
            await killing
            seconds, busy = time.perf_counter() - started, busy_seconds(sandbox) - before
            each = f"{1e3 * busy / count:11.2f}" if busy > 0 else f"{'(restarted)':>11s}"
            print(f"{part:4d}  {count / seconds:12.1f}  {each}  {megabytes(os.getpid()):15.1f}  "
                  f"{megabytes(sandbox.pid):24.1f}  {descriptors(os.getpid())}, {descriptors(sandbox.pid)}", flush=True)
    print("every result was the right one, once")


async def execute(sandbox: LocalSandbox, numbers: Iterator[int]) -> None:
    """Run the snippets of these numbers, each the next that nobody has taken; every tenth is hostile."""
    for number in numbers:
        if number % 10 == 0:
            code, outcome = HOSTILE[number // 10 % len(HOSTILE)]
            execution = await sandbox.run(code)
            assert execution.outcome == outcome, f"{code!r} became {execution}"
        else:
            execution = await sandbox.run(f"print({number} ** 2)")
            assert execution.stdout == f"{number ** 2}\n", f"{number} became {execution}"


async def kill_parent(sandbox: LocalSandbox, wanted: bool, numbers: Iterator[int], total: int) -> None:
    """In the middle of a part, if `wanted`."""
    while wanted and operator.length_hint(numbers) > total // PARTS // 2:
        await asyncio.sleep(0.01)
    if wanted:
        os.kill(sandbox.pid, signal.SIGKILL)
        print(f"      the parent, {sandbox.pid}, is killed")


def busy_seconds(sandbox: LocalSandbox) -> float:
    """CPU seconds so far of the parent, its reaped children and this process."""
    return parent_seconds(sandbox.pid) + own_seconds(resource.RUSAGE_SELF)


def megabytes(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


async def sandbox_seconds(sandbox: LocalSandbox, code: str, count: int) -> float:
    """CPU seconds of one execution in the sandbox."""
    before = parent_seconds(sandbox.pid) + own_seconds(resource.RUSAGE_SELF)
    for _ in range(count):
        assert (await sandbox.run(code)).passed, "the snippet must run"
    return (parent_seconds(sandbox.pid) + own_seconds(resource.RUSAGE_SELF) - before) / count


def fresh_seconds(code: str, count: int) -> float:
    """CPU seconds of one `python -c`."""
    before = own_seconds(resource.RUSAGE_CHILDREN)
    for _ in range(count):
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return (own_seconds(resource.RUSAGE_CHILDREN) - before) / count


def own_seconds(who: int) -> float:
    """User and system seconds of this process, or of its reaped children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def parent_seconds(pid: int) -> float:
    """User and system seconds of another process and its reaped children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    config.run(main, Options, __doc__)
