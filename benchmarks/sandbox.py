"""CPU time of one execution: the local sandbox against a fresh `python -c`, interleaved in one run.

    python benchmarks/sandbox.py

CPU time is user plus system time of all processes involved: the warm parent with its reaped children (from /proc) and
this process for the sandbox, the children of this process for `python -c`.
"""

import asyncio
import os
import platform
import resource
import subprocess
import sys
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


@dataclass
class Options:
    """One flag a field."""

    rounds: int = option(10, "times that each side is measured, interleaved")
    per_round: int = option(20, "executions in the sandbox a round; python -c runs once for every five of them")


def main(options: Options) -> None:
    """Print one line a snippet."""
    print(f"python {platform.python_version()}")
    asyncio.run(measure(options))


async def measure(options: Options) -> None:
    """Interleave both sides for each snippet."""
    async with LocalSandbox(num_workers=1) as sandbox:
        for name, code in SNIPPETS.items():
            ours = fresh = 0.0
            for _ in range(options.rounds):
                ours += await sandbox_seconds(sandbox, code, options.per_round)
                fresh += fresh_seconds(code, max(1, options.per_round // 5))
            ours, fresh = ours / options.rounds, fresh / options.rounds
            print(f"{name}: sandbox {1e3 * ours:.1f} ms, python -c {1e3 * fresh:.1f} ms of CPU time, "
                  f"{fresh / ours:.1f} times less", flush=True)


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
