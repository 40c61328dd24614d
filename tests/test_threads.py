"""A call in a thread: its result, its exception, and an end of the program that does not wait for it."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from thor.threads import in_thread

ROOT = Path(__file__).parent.parent


def test_a_call_gives_its_result_or_its_exception_and_runs_beside_the_event_loop():
    async def run() -> tuple[int, bool]:
        gone = threading.Event()
        waiting = asyncio.create_task(in_thread(gone.wait, 30))
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0)
        gone.set()
        return await in_thread(divmod, 7, 2), await waiting

    assert asyncio.run(run()) == ((3, 1), True)


def test_the_end_of_the_program_does_not_wait_for_a_call_that_was_cancelled():
    script = ("import asyncio, time\nfrom thor.threads import in_thread\nasync def run():\n"
              "    await asyncio.wait_for(in_thread(time.sleep, 3600), 0.1)\nasyncio.run(run())")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.endswith("TimeoutError\n")
