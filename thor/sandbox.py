"""Running code that a model wrote: `await sandbox.run(code) -> Execution`, with a typed outcome and never an exception.

The local sandbox talks to a warm parent process (sandbox_server.py) that forks once per snippet. Invariants: only what
the policy caused is judged, so a parent that dies is restarted and its snippets run again, and what still cannot be run
is `infrastructure`. The same code gives the same output: hashes, `random`, numpy's global and sympy's own generator are
seeded alike for each snippet (the time, object addresses and the system's random bytes are what they are).
"""

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from thor.sandbox_child import TIERS, Limits, remove
from thor.sandbox_http import RemoteSandbox
from thor.sandbox_log import LoggedSandbox
from thor.trajectory import Execution

START_SECONDS = 120  # for the parent's imports on a slow, busy machine
STOP_SECONDS = 10
MAX_TRIES = 3  # of a snippet whose parent died under it
RETRY_SECONDS = 0.5
WALL_PER_CPU = 2  # a service over HTTP is told wall-clock time; its machines are busy, too

ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class LocalSandbox:
    """Runs snippets on this machine, `num_workers` at a time; use as `async with LocalSandbox() as sandbox`.

    `cpu_seconds` (rounded up to whole seconds), `memory_mb` (beyond the warm parent's own) and `output_bytes` of stdout
    decide outcomes; `wall_seconds` is the backstop for code that sleeps. `isolation` is "best" (the strongest that the
    kernel allows), "strict" (all of it or a ValueError) or "basic" (no namespaces); what it came to is said on stderr,
    and is in `tier`, with what it lacks in `missing`. Opening raises ValueError if the sandbox cannot start.
    """

    def __init__(self, num_workers: int = 8, wall_seconds: float = 60.0, cpu_seconds: float = 10.0,
                 memory_mb: int = 1024, output_bytes: int = 65536, isolation: str = "best"):
        self.limits = Limits(num_workers, wall_seconds, cpu_seconds, memory_mb, output_bytes)
        for name, value in asdict(self.limits).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if isolation not in TIERS:
            raise ValueError(f"the sandbox's isolation is {isolation!r}; it must be one of {', '.join(TIERS)}")
        self.isolation, self.tier, self.missing = isolation, "", ""
        self._parent: _Parent | None = None
        self._restarting = asyncio.Lock()

    async def __aenter__(self) -> "LocalSandbox":
        self._parent = await _start(self.limits, self.isolation)
        self.tier, self.missing = self._parent.tier, self._parent.missing
        announce(self.tier, self.missing)
        first = await self.run("print(1)")
        if not first.passed:
            await self.__aexit__()
            raise ValueError(f"the sandbox cannot start: {first.error}")
        return self

    async def __aexit__(self, *error: object) -> None:
        parent, self._parent = self._parent, None
        await parent.close()

    async def run(self, code: str) -> Execution:
        """Run one snippet. Never raises for what code does; `infrastructure` if the sandbox itself keeps failing."""
        reason = ""
        for failures in range(MAX_TRIES):
            await asyncio.sleep(failures * RETRY_SECONDS)
            try:
                execution = await (await self._living_parent()).request(code)
            except (OSError, ValueError) as error:
                reason = str(error)
                continue
            if execution.outcome != "infrastructure":
                return execution
            reason = execution.error
        return Execution("infrastructure", "", reason, 0.0)

    @property
    def pid(self) -> int:
        """The warm parent's process id."""
        assert self._parent is not None, "the sandbox is not open"
        return self._parent.pid

    async def _living_parent(self) -> "_Parent":
        """The parent, another one if it has died. ValueError if none can be started."""
        async with self._restarting:
            assert self._parent is not None, "the sandbox is not open"
            if self._parent.reading.done():
                await self._parent.close()
                self._parent = await _start(self.limits, self.isolation)
            return self._parent


class _Parent:
    """One life of the warm process: its directory, its socket, and who waits for which answer."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="thor-sandbox-")
        os.chmod(self.directory, 0o711)  # snippets may have uids of their own
        self.complaints = tempfile.TemporaryFile()
        self.process: subprocess.Popen | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.reading: asyncio.Task | None = None
        self.waiting: dict[int, asyncio.Future] = {}
        self.num_requests = self.pid = 0
        self.tier = self.missing = ""

    async def open(self, limits: Limits, isolation: str) -> None:
        """Start the process and wait until it has imported everything. Raises OSError if it does not get there."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, self.writer = await asyncio.open_connection(sock=ours)
            command = [sys.executable, "-m", "thor.sandbox_server", str(theirs.fileno()), self.directory,
                       json.dumps(asdict(limits)), isolation]
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=ENVIRONMENT, cwd=Path(__file__).parent.parent,
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.complaints)
        ready = await asyncio.wait_for(_read_frame(reader), START_SECONDS)
        self.pid, self.tier, self.missing = ready["pid"], ready["isolation"], ready["missing"]
        if not ready["needs_directory"]:
            os.rmdir(self.directory)  # the process has a file system of its own, from where it could not delete it
        self.reading = asyncio.create_task(self._read_answers(reader))

    async def request(self, code: str) -> Execution:
        """One snippet's result. ConnectionError if the process dies first."""
        self.num_requests += 1
        number, frame = self.num_requests, json.dumps({"id": self.num_requests, "code": code}).encode()
        answer = self.waiting[number] = asyncio.get_running_loop().create_future()
        self.writer.write(len(frame).to_bytes(4, "big") + frame)  # if it is dead, then `reading` is about to say so
        return await answer

    async def _read_answers(self, reader: asyncio.StreamReader) -> None:
        """Hand each result to whoever waits for it; when the process is gone, tell all of them."""
        try:
            while True:
                message = await _read_frame(reader)
                answer = self.waiting.pop(message.pop("id"))
                if not answer.done():
                    answer.set_result(Execution(**message))
        except OSError:
            for answer in self.waiting.values():
                if not answer.done():
                    answer.set_exception(ConnectionError(f"the sandbox's parent process died{self.complaint()}"))

    async def close(self) -> None:
        """Hang up, wait until the process has cleared everything away, and clear away what it could not."""
        if self.writer is not None:
            self.writer.close()
        if self.process is not None:
            try:
                await asyncio.to_thread(self.process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.process.returncode != 0:
                await asyncio.to_thread(_kill_leftovers, self.directory)
        if self.reading is not None:
            await self.reading
        await asyncio.to_thread(remove, self.directory)
        self.complaints.close()

    def complaint(self) -> str:
        """The last line that the process wrote to stderr, to append to a sentence."""
        self.complaints.seek(0)
        lines = self.complaints.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


async def _start(limits: Limits, isolation: str) -> _Parent:
    """A warm parent that answers. ValueError if there is none to be had."""
    parent = None
    try:
        parent = _Parent()
        await parent.open(limits, isolation)
        return parent
    except OSError as error:
        reason = parent and parent.complaint() or f": {error or 'no answer'}"
        raise ValueError(f"the sandbox cannot start{reason}") from None
    finally:
        if parent is not None and parent.reading is None:
            await parent.close()


async def _read_frame(reader: asyncio.StreamReader) -> dict:
    """One message. ConnectionError when the other side has hung up."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        return json.loads(await reader.readexactly(size))
    except asyncio.IncompleteReadError:
        raise ConnectionError("its process ended") from None


@functools.lru_cache
def announce(tier: str, missing: str) -> None:
    """Say on stderr, once a process, what keeps snippets in, and warn if it is not the strongest there is."""
    print(f"isolation: {tier}", file=sys.stderr)
    if missing:
        print(f"warning: the sandbox is weaker than it could be: {missing}; see docs/sandbox.md", file=sys.stderr)


def _kill_leftovers(directory: str) -> None:
    """End what the snippets of a parent that was killed had started: their main processes died with it.

    Forks have its command line, other programs its environment; both name its directory.
    """
    for _ in range(100):
        pids = [int(pid) for pid in filter(str.isdecimal, os.listdir("/proc")) if _names(pid, directory)]
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # it has just ended, or is not ours to kill
                continue
        time.sleep(0.01)


def _names(pid: str, directory: str) -> bool:
    for file in ("cmdline", "environ"):
        try:
            if directory.encode() in Path(f"/proc/{pid}/{file}").read_bytes():
                return True
        except OSError:  # it has just ended, or is not ours to read
            continue
    return False


def open_sandbox(spec: str, cpu_seconds: float = 10.0, require: str = "best", log: str | None = None,
                 log_mode: str = "record", output_bytes: int = 65536) -> LocalSandbox | RemoteSandbox | LoggedSandbox:
    """The sandbox that `--sandbox`, `--cpu_seconds` and `--sandbox_…` name. ValueError for what there is not.

    `output_bytes` is for a local one; a service has limits of its own.
    """
    urls = spec.split(",")
    if spec == "local":
        sandbox = LocalSandbox(cpu_seconds=cpu_seconds, output_bytes=output_bytes, isolation=require)
        limits = asdict(sandbox.limits)
        del limits["num_workers"]  # decides nothing
    elif all(url.startswith(("http://", "https://")) for url in urls):
        sandbox = RemoteSandbox(urls, run_seconds=WALL_PER_CPU * cpu_seconds)
        limits = sandbox.limits
        if log is not None and log_mode == "cache":
            raise ValueError("--sandbox_log_mode cache needs --sandbox local, where random numbers are seeded alike each time")
    else:
        raise ValueError(f"--sandbox {spec}: it must be local or the URLs of a sandbox service")
    if log is None and log_mode != "record":
        raise ValueError(f"--sandbox_log_mode {log_mode} needs --sandbox_log, the file that it is about")
    return sandbox if log is None else LoggedSandbox(sandbox, log, log_mode, limits)
