"""The warm parent of the local sandbox: imports the mathematics once, forks once per snippet, decides its outcome.

It runs as a process of its own and imports nothing of ours, so it stays small to fork and a busy trainer cannot distort
what it measures. It reads its children's pipes itself, never holds more than a snippet may print, and hands back one
finished result per snippet. Invariants: what decides an outcome is CPU time, memory and output, with wall-clock only a
backstop; when a result is sent, no process, pipe or file of the snippet is left.

Frames on the control socket: 4 bytes of length, then JSON. In: {"id", "code"}. Out: {"ready": true} once, then
{"id", "outcome", "stdout", "error", "seconds"}.
"""

import ctypes
import gc
import json
import math
import os
import random
import resource
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
from dataclasses import dataclass, field

STDERR_TAIL = 8192  # bytes of stderr that are kept: its last line is what a failure shows
FILE_BYTES = 64 << 20
MAX_PROCESSES = 64  # of one snippet
FIRST_UID = 61_000  # real uids of snippets when we are root: RLIMIT_NPROC counts by real uid and spares root

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}.get(os.uname().machine)

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """What one snippet may use; the same fields as LocalSandbox's arguments."""

    num_workers: int
    wall_seconds: float
    cpu_seconds: float
    memory_mb: int
    output_bytes: int


@dataclass
class Snippet:
    """A running child: its pipes, what it has written so far, and why it was killed if we killed it."""

    id: int
    worker: int
    pid: int
    pidfd: int
    stdout: int
    stderr: int
    directory: str
    started: float
    printed: bytearray = field(default_factory=bytearray)
    complained: bytearray = field(default_factory=bytearray)
    killed_for: str = ""


def main(control_fd: int, limits: Limits) -> None:
    """Serve until the control socket closes."""
    warm_up()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    control = socket.socket(fileno=control_fd)
    control.setblocking(True)
    send(control, {"ready": True})
    Server(control, limits).serve()


def warm_up() -> None:
    """Import what snippets import and let sympy fill its caches; freeze it all, so that forks share the pages."""
    import fractions, itertools, math, statistics  # noqa: E401, F401

    import numpy
    import sympy

    x = sympy.symbols("x")
    str(sympy.factor(x**4 - 1)), sympy.solve(x**2 - x - 1, x), sympy.primerange(2, 50), sympy.divisor_sigma(28)
    sympy.factorint(360), sympy.simplify((x**2 - 1) / (x - 1)), sympy.integrate(x**2, x), numpy.linalg.inv(numpy.eye(2))
    numpy.random.seed(0)  # loaded lazily by numpy
    gc.collect()
    gc.freeze()


class Server:
    """One loop over the control socket, the children's pipes and their exits."""

    def __init__(self, control: socket.socket, limits: Limits):
        self.control, self.limits = control, limits
        self.base_memory = _virtual_memory()
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, None)
        self.inbox = bytearray()
        self.queue: list[dict] = []
        self.running: dict[int, Snippet] = {}  # by pid
        self.free_workers = list(range(limits.num_workers))[::-1]

    def serve(self) -> None:
        """Until the trainer is gone."""
        while True:
            for key, _ in self.selector.select(self._seconds_to_deadline()):
                if key.fileobj is self.control:
                    if not self._read_requests():
                        return self._shut_down()
                elif key.data.pid in self.running:
                    self._serve_child(key.data, key.fd)
            self._kill_overdue()
            while self.queue and self.free_workers:
                self._start(self.queue.pop(0))

    def _read_requests(self) -> bool:
        """Take what the trainer sent; False when it has hung up."""
        data = self.control.recv(1 << 16)
        self.inbox += data
        while len(self.inbox) >= 4 and len(self.inbox) >= 4 + int.from_bytes(self.inbox[:4], "big"):
            size = int.from_bytes(self.inbox[:4], "big")
            self.queue.append(json.loads(self.inbox[4:4 + size]))
            del self.inbox[:4 + size]
        return bool(data)

    def _start(self, request: dict) -> None:
        worker, directory = self.free_workers.pop(), tempfile.mkdtemp(prefix="snippet-")
        stdout, stdout_child = os.pipe()
        stderr, stderr_child = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_child(request["code"], directory, stdout_child, stderr_child, worker, self.limits, self.base_memory)
        os.close(stdout_child)
        os.close(stderr_child)
        os.set_blocking(stdout, False)
        os.set_blocking(stderr, False)
        snippet = Snippet(request["id"], worker, pid, os.pidfd_open(pid), stdout, stderr, directory, time.monotonic())
        self.running[pid] = snippet
        for fd in (stdout, stderr, snippet.pidfd):
            self.selector.register(fd, selectors.EVENT_READ, snippet)

    def _serve_child(self, snippet: Snippet, fd: int) -> None:
        if fd == snippet.pidfd:
            self._finish(snippet)
        elif not self._read_pipe(snippet, fd):
            self.selector.unregister(fd)  # closed by the child; its exit comes by the pidfd

    def _read_pipe(self, snippet: Snippet, fd: int) -> bool:
        """Read once; False at the end of the pipe. Over the output limit the snippet is killed and reading goes on."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        if fd == snippet.stderr:
            snippet.complained += data
            del snippet.complained[:-STDERR_TAIL]
        else:
            snippet.printed += data
            if len(snippet.printed) > self.limits.output_bytes:
                del snippet.printed[self.limits.output_bytes:]
                self._kill(snippet, "output-limit")
        return bool(data)

    def _kill(self, snippet: Snippet, reason: str) -> None:
        snippet.killed_for = snippet.killed_for or reason
        for victim in (lambda: os.killpg(snippet.pid, signal.SIGKILL), lambda: os.kill(snippet.pid, signal.SIGKILL)):
            try:
                victim()
            except ProcessLookupError:
                pass

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for snippet in list(self.running.values()):
            if now - snippet.started > self.limits.wall_seconds:
                self._kill(snippet, "wall")

    def _seconds_to_deadline(self) -> float | None:
        started = [snippet.started for snippet in self.running.values() if not snippet.killed_for]
        return max(0.0, min(started) + self.limits.wall_seconds - time.monotonic()) + 0.01 if started else None

    def _finish(self, snippet: Snippet) -> None:
        """The main process has ended: take what is still in the pipes, clear everything away, send the result."""
        seconds = time.monotonic() - snippet.started
        status, usage = os.wait4(snippet.pid, 0)[1:]
        self._kill(snippet, snippet.killed_for)  # whoever is left of its group
        for fd in (snippet.stdout, snippet.stderr):
            self._drain(snippet, fd)
        del self.running[snippet.pid]
        self._kill_orphans()
        for fd in (snippet.stdout, snippet.stderr, snippet.pidfd):
            if fd in self.selector.get_map():
                self.selector.unregister(fd)
            os.close(fd)
        remove(snippet.directory)
        self.free_workers.append(snippet.worker)
        outcome, error = judge(snippet, status, usage, self.limits)
        stdout = snippet.printed.decode("utf-8", "replace")
        send(self.control, {"id": snippet.id, "outcome": outcome, "stdout": stdout, "error": error, "seconds": seconds})

    def _drain(self, snippet: Snippet, fd: int) -> None:
        """Read what is left, which is at most what a pipe holds: nobody who writes to it is alive."""
        for _ in range(64):
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                return
            target = snippet.complained if fd == snippet.stderr else snippet.printed
            target += data

    def _kill_orphans(self) -> None:
        """Kill and reap whoever was re-parented to us: children that are no running snippet's main process."""
        while True:
            strangers = [pid for pid in child_pids() if pid not in self.running]
            if not strangers:
                return
            for pid in strangers:
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError):
                    pass

    def _shut_down(self) -> None:
        for snippet in list(self.running.values()):
            self._kill(snippet, "shutdown")
            os.waitpid(snippet.pid, 0)
            remove(snippet.directory)
        self.running = {}
        self._kill_orphans()


def child_pids() -> list[int]:
    """Our children, orphans given to us included."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def judge(snippet: Snippet, status: int, usage: resource.struct_rusage, limits: Limits) -> tuple[str, str]:
    """(outcome, what the model is told) from how the main process ended and what it wrote."""
    lines = [line for line in snippet.complained.decode("utf-8", "replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if snippet.killed_for == "output-limit" or len(snippet.printed) > limits.output_bytes:
        del snippet.printed[limits.output_bytes:]
        return "output-limit", f"OutputLimitError: more than {limits.output_bytes} bytes"
    if snippet.killed_for == "wall":
        return "timeout", f"TimeoutError: exceeded {limits.wall_seconds:g} s"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or usage.ru_utime + usage.ru_stime >= limits.cpu_seconds:
            return "timeout", f"TimeoutError: exceeded {limits.cpu_seconds:g} s"
        if number == signal.SIGKILL and usage.ru_maxrss * 1024 > 0.8 * (limits.memory_mb << 20):
            return "memory", "MemoryError"
        return "error", f"Killed: {signal.Signals(number).name}"
    if os.WEXITSTATUS(status) != 0:
        if last.partition(":")[0].endswith("MemoryError"):
            return "memory", "MemoryError"
        return "error", last or f"exit code {os.WEXITSTATUS(status)}"
    if snippet.printed.decode("utf-8", "replace").strip():
        return "ok", ""
    return "silent", "(no output: print the result)"


def run_child(code: str, directory: str, stdout: int, stderr: int, worker: int, limits: Limits, base_memory: int) -> None:
    """In the forked child: become nobody's business, then run the code. Never returns."""
    try:
        confine(directory, stdout, stderr, worker, limits, base_memory)
        status = run_code(code)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(status)


def confine(directory: str, stdout: int, stderr: int, worker: int, limits: Limits, base_memory: int) -> None:
    """The one place where a child gives up what it inherited: session, descriptors, limits, rights, environment."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0] if sys.platform != "linux" else 65536)
    os.chdir(directory)
    os.environ.update(HOME=directory, TMPDIR=directory)
    cpu, memory = math.ceil(limits.cpu_seconds), base_memory + (limits.memory_mb << 20)
    for kind, soft, hard in ((resource.RLIMIT_CPU, cpu, cpu + 1), (resource.RLIMIT_AS, memory, memory),
                             (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES), (resource.RLIMIT_CORE, 0, 0),
                             (resource.RLIMIT_NOFILE, 256, 256)):
        resource.setrlimit(kind, (soft, hard))
    limit_processes(worker)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)


def limit_processes(worker: int) -> None:
    """RLIMIT_NPROC, which counts by real uid and spares the privileged: as root, take a uid of our own and drop rights."""
    if os.geteuid() == 0 and SYS_CAPSET is not None:
        os.setresuid(FIRST_UID + worker, 0, 0)
        header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
        libc.syscall(SYS_CAPSET, header, none)
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))


def run_code(code: str) -> int:
    """Run the snippet as `python` would run a file, in a namespace of its own; returns the exit code."""
    random.seed(0)
    sys.modules["numpy"].random.seed(0)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__builtins__ = __builtins__
    sys.argv = ["code.py"]
    try:
        exec(compile(code, "<code>", "exec"), module.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exception(type(error), error, error.__traceback__.tb_next)
        return 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    return 0


def remove(directory: str) -> None:
    """Delete a snippet's directory, also where it made parts of it read-only."""
    shutil.rmtree(directory, ignore_errors=True)
    if os.path.isdir(directory):
        for place, _, _ in os.walk(directory):
            os.chmod(place, 0o700)
        shutil.rmtree(directory, ignore_errors=True)


def send(control: socket.socket, message: dict) -> None:
    """One frame to the trainer; nothing if it is gone, which the next read will notice."""
    data = json.dumps(message).encode()
    try:
        control.sendall(len(data).to_bytes(4, "big") + data)
    except (BrokenPipeError, ConnectionResetError):
        pass


def _virtual_memory() -> int:
    """Bytes of address space that this process has, which its children start with."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]), Limits(**json.loads(sys.argv[2])))
