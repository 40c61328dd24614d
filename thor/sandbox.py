"""Running code that a model wrote: `await sandbox.run(code) -> Execution`, with a typed outcome and never an exception.

The local sandbox talks to a warm parent process (sandbox_server.py), which forks once per snippet. Invariants: only what
the policy caused is judged, so a parent that dies is restarted and its snippets run again, and what still cannot be run
is `infrastructure`; the same code gives the same output (hashes, `random` and numpy's generator are seeded alike).
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from thor.sandbox_server import Limits
from thor.trajectory import Execution

START_SECONDS = 120  # for the parent's imports on a slow, busy machine
MAX_TRIES = 3  # of a snippet whose parent died under it

ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class LocalSandbox:
    """Runs snippets on this machine, `num_workers` at a time; use as `async with LocalSandbox() as sandbox`.

    `cpu_seconds` (rounded up to whole seconds), `memory_mb` (beyond the warm parent's own) and `output_bytes` decide
    outcomes; `wall_seconds` is the backstop for code that sleeps.
    """

    def __init__(self, num_workers: int = 8, wall_seconds: float = 60.0, cpu_seconds: float = 10.0,
                 memory_mb: int = 1024, output_bytes: int = 65536):
        self.limits = Limits(num_workers, wall_seconds, cpu_seconds, memory_mb, output_bytes)
        for name, value in asdict(self.limits).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self._process: subprocess.Popen | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task | None = None
        self._waiting: dict[int, asyncio.Future] = {}
        self._next_id = 0
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> "LocalSandbox":
        await self._start()
        first = await self.run("print(1)")
        if not first.passed:
            await self._stop()
            raise ValueError(f"the sandbox cannot start: {first.error}")
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stop()

    async def run(self, code: str) -> Execution:
        """Run one snippet. Never raises for what the code does; `infrastructure` if the sandbox itself keeps failing."""
        reason = ""
        for _ in range(MAX_TRIES):
            try:
                return await self._request(code)
            except (ConnectionError, ValueError) as error:
                reason = str(error)
        return Execution("infrastructure", "", reason, 0.0)

    @property
    def pid(self) -> int:
        """The warm parent's process id."""
        assert self._process is not None, "the sandbox is not open"
        return self._process.pid

    async def _request(self, code: str) -> Execution:
        async with self._starting:
            if self._process is None or self._reader_task.done():
                await self._stop()
                await self._start()
        self._next_id += 1
        answer = self._waiting[self._next_id] = asyncio.get_running_loop().create_future()
        frame = json.dumps({"id": self._next_id, "code": code}).encode()
        self._writer.write(len(frame).to_bytes(4, "big") + frame)
        await self._writer.drain()
        return await answer

    async def _start(self) -> None:
        """Start the parent and wait until it has imported everything. ValueError if it cannot start."""
        ours, theirs = socket.socketpair()
        server = Path(__file__).with_name("sandbox_server.py")
        command = [sys.executable, "-s", "-P", str(server), str(theirs.fileno()), json.dumps(asdict(self.limits))]
        try:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=ENVIRONMENT, cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except OSError as error:
            raise ValueError(f"the sandbox cannot start: {error}") from None
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            await asyncio.wait_for(_read_frame(reader), START_SECONDS)
        except (ConnectionError, TimeoutError):
            self._process.kill()
            complaint = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
            await self._stop()
            raise ValueError(f"the sandbox cannot start: {complaint[-1] if complaint else 'no answer'}") from None
        self._reader_task = asyncio.create_task(self._read_answers(reader))

    async def _read_answers(self, reader: asyncio.StreamReader) -> None:
        """Hand each result to whoever waits for it; when the parent is gone, tell all of them."""
        try:
            while True:
                message = await _read_frame(reader)
                answer = self._waiting.pop(message.pop("id"))
                if not answer.done():
                    answer.set_result(Execution(**message))
        except ConnectionError:
            waiting, self._waiting = self._waiting, {}
            for answer in waiting.values():
                if not answer.done():
                    answer.set_exception(ConnectionError("the sandbox's parent process died"))

    async def _stop(self) -> None:
        """Hang up, and wait for the parent to have cleared everything away."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, 10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process.stderr.close()
        if self._reader_task is not None:
            await asyncio.gather(self._reader_task, return_exceptions=True)
        self._process = self._writer = self._reader_task = None


async def _read_frame(reader: asyncio.StreamReader) -> dict:
    """One message. ConnectionError when the other side has hung up."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        return json.loads(await reader.readexactly(size))
    except asyncio.IncompleteReadError:
        raise ConnectionError("the sandbox's parent process hung up") from None


def open_sandbox(spec: str) -> LocalSandbox:
    """The sandbox that `--sandbox` names."""
    if spec == "local":
        return LocalSandbox()
    raise ValueError(f"--sandbox {spec}: sandboxes over HTTP are not supported yet; use local")
