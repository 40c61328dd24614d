"""The warm parent of the local sandbox: imports the mathematics once, forks once per snippet, decides its outcome.

It runs as a process of its own, small to fork, and a busy trainer cannot distort what it measures: it reads its
children's pipes itself, never holds more than a snippet may print, and never waits for the trainer to take a result.
Invariant: when a result is sent, no process, pipe or file of that snippet is left (a process that detached itself from
its snippet may be ended earlier, with any other). What goes wrong here ends the parent; sandbox.py starts another one
and runs again what was lost.

Frames on the control socket: 4 bytes of length, then JSON. In: {"id", "code"}. Out: {"ready": true} once, then
{"id", "outcome", "stdout", "error", "seconds"}.
"""

import json
import math
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from thor.isolation import HOME, PidNamespaces, become_first_process, enter_view
from thor.sandbox_child import (PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, Confinement, Limits, Newborn,
                                choose_tier, clear, plan_confinement, prctl, remove, run_child)
from thor.sandbox_warm import warm_up

READ_BYTES = 1 << 16
STDERR_TAIL = 8192  # bytes of stderr that are kept: its last line is what a failure shows
SIGNAL_NAMES = {int(number): number.name for number in signal.Signals}  # real-time signals have none


@dataclass
class Snippet:
    """A running child: its pipes, what it has written so far, and why it was killed if we killed it."""

    id: int
    worker: int
    pid: int
    pidfd: int
    init: int | None  # the first process of its PID namespace, where it has one
    stdout: int
    stderr: int
    setup: int  # says why the child could not be confined; nothing once the code runs
    directory: str
    started: float
    printed: bytearray = field(default_factory=bytearray)
    complained: bytearray = field(default_factory=bytearray)
    killed_for: str = ""


def main(control_fd: int, directory: str, limits: Limits, isolation: str = "basic") -> None:
    """Serve until the trainer hangs up or is gone. In the children that are forked on the way: run one snippet."""
    forget_ourselves()
    try:
        tier = choose_tier(directory, isolation)
    except ValueError as error:
        sys.exit(str(error))
    if tier.namespaces:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        enter_view(directory)
        become_first_process()
    warm_up()
    child = serve(control_fd, directory, limits, plan_confinement(tier, limits))
    if child is not None:
        run_child(child)


def serve(control_fd: int, directory: str, limits: Limits, confinement: Confinement) -> Newborn | None:
    """The parent's life. Returns twice, like fork: in each child, with nothing of the parent's within its reach."""
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    if not confinement.tier.namespaces:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        # The trainer's death is heard from the socket, or by this signal where a fork of the trainer keeps it open.
        signal.signal(signal.SIGTERM, lambda *_: control.shutdown(socket.SHUT_RDWR))
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, then a snippet dies of it
    server = Server(control, directory, limits, confinement)
    child = None
    try:
        child = server.serve()
    finally:
        if child is None and not confinement.tier.namespaces:  # with namespaces the kernel sees to it
            server.shut_down()
    return child


def forget_ourselves() -> None:
    """Make a snippet unable to import this project: it is not part of Python."""
    sys.path.remove(os.getcwd())
    os.chdir("/")
    for name in [name for name in sys.modules if name.partition(".")[0] == "thor"]:
        del sys.modules[name]


class Server:
    """One loop over the control socket, the children's pipes and their exits."""

    def __init__(self, control: socket.socket, directory: str, limits: Limits, confinement: Confinement):
        self.control, self.directory, self.limits, self.confinement = control, directory, limits, confinement
        self.namespaces = PidNamespaces() if confinement.tier.namespaces else None
        self.selector = selectors.DefaultSelector()
        self.inbox, self.outbox = bytearray(), bytearray()
        self.queue: deque[dict] = deque()
        self.running: dict[int, Snippet] = {}  # by pid
        self.free_workers = list(range(limits.num_workers))[::-1]

    def serve(self) -> Newborn | None:
        """Until the trainer has hung up; then None. In a forked child: what it is to run."""
        self.control.setblocking(False)
        self.selector.register(self.control, selectors.EVENT_READ, None)
        tier = self.confinement.tier
        pid = int(os.readlink("/proc/self"))  # as the trainer sees it: the file system is still its own there
        self._send({"ready": True, "pid": pid, "isolation": str(tier), "missing": tier.missing,
                    "needs_directory": not tier.namespaces})
        while True:
            for key, events in self.selector.select(self._seconds_to_deadline()):
                if key.fileobj is self.control:
                    if events & selectors.EVENT_WRITE:
                        self._write()
                    if events & selectors.EVENT_READ and not self._read_requests():
                        return None
                elif key.data.pid in self.running:
                    self._serve_child(key.data, key.fd)
            self._kill_overdue()
            while self.queue and self.free_workers:
                if (child := self._start(self.queue.popleft())) is not None:
                    return child

    def shut_down(self) -> None:
        """Leave nothing behind."""
        for snippet in self.running.values():
            self._kill(snippet, "shutdown")
        self.running = {}
        self._kill_orphans()
        remove(self.directory)

    def _read_requests(self) -> bool:
        """Take what the trainer sent; False when it has hung up."""
        try:
            data = self.control.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except ConnectionError:  # it died with results unread
            return False
        self.inbox += data
        while len(self.inbox) >= 4 and len(self.inbox) >= 4 + int.from_bytes(self.inbox[:4], "big"):
            size = int.from_bytes(self.inbox[:4], "big")
            self.queue.append(json.loads(self.inbox[4:4 + size]))
            del self.inbox[:4 + size]
        return bool(data)

    def _send(self, message: dict) -> None:
        data = json.dumps(message).encode()
        self.outbox += len(data).to_bytes(4, "big") + data
        self._write()

    def _write(self) -> None:
        """Send what the socket takes, and ask to be told when it takes more: a busy trainer holds nobody up."""
        try:
            del self.outbox[:self.control.send(self.outbox)]
        except BlockingIOError:
            pass
        except ConnectionError:  # it is gone, which the next read will say
            self.outbox.clear()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outbox else 0)
        self.selector.modify(self.control, events, None)

    def _start(self, request: dict) -> Newborn | None:
        """Fork a child for a request. In the child: what it is to run, and the parent's affairs forgotten."""
        worker = self.free_workers.pop()
        directory, init = HOME, None
        if self.namespaces is None:
            directory = os.path.join(self.directory, str(worker))
            os.makedirs(directory, 0o700, exist_ok=True)
        pipes = [os.pipe() for _ in range(3)]
        if self.namespaces is not None:
            init = self.namespaces.enter()
        pid = os.fork()
        if pid == 0:
            self._forget()
            return Newborn(request["code"], directory, worker, [ours for _, ours in pipes], self.confinement)
        if self.namespaces is not None:
            self.namespaces.leave()
        for theirs, ours in pipes:
            os.close(ours)
            os.set_blocking(theirs, False)
        fds = [theirs for theirs, _ in pipes]
        snippet = Snippet(request["id"], worker, pid, os.pidfd_open(pid), init, *fds, directory, time.monotonic())
        self.running[pid] = snippet
        for fd in (snippet.stdout, snippet.stderr, snippet.pidfd):
            self.selector.register(fd, selectors.EVENT_READ, snippet)
        return None

    def _forget(self) -> None:
        """In a child: drop what other snippets printed and what they are to run, and all that leads to it."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.selector.close()
        for memory in (self.running, self.queue, self.inbox, self.outbox):
            memory.clear()

    def _serve_child(self, snippet: Snippet, fd: int) -> None:
        if fd == snippet.pidfd:
            self._finish(snippet)
        elif self._read_pipe(snippet, fd) == b"":
            self.selector.unregister(fd)  # closed by the child; its exit comes by the pidfd

    def _read_pipe(self, snippet: Snippet, fd: int) -> bytes | None:
        """Read once: b"" at the end, None if there is nothing now. Over the limit it kills, and drops what comes."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return None
        if fd == snippet.stderr:
            snippet.complained += data
            del snippet.complained[:-STDERR_TAIL]
        else:
            snippet.printed += data
            if len(snippet.printed) > self.limits.output_bytes:
                del snippet.printed[self.limits.output_bytes:]
                self._kill(snippet, "output-limit")
        return data

    def _kill(self, snippet: Snippet, reason: str) -> None:
        """Kill the process group, and the main process in case it has not made one yet, unless it has been reaped."""
        snippet.killed_for = snippet.killed_for or reason
        if snippet.pid not in self.running:
            return
        try:
            os.killpg(snippet.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        signal.pidfd_send_signal(snippet.pidfd, signal.SIGKILL)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for snippet in self.running.values():
            if not snippet.killed_for and now - snippet.started > self.limits.wall_seconds:
                ended = os.waitid(os.P_PIDFD, snippet.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if not ended:  # if it has, then we are late, not the snippet
                    self._kill(snippet, "wall")

    def _seconds_to_deadline(self) -> float | None:
        started = [snippet.started for snippet in self.running.values() if not snippet.killed_for]
        return max(0.0, min(started) + self.limits.wall_seconds - time.monotonic()) + 0.01 if started else None

    def _finish(self, snippet: Snippet) -> None:
        """The main process has ended: kill whom it left, take what is still in the pipes, send the result."""
        seconds = time.monotonic() - snippet.started
        self._kill(snippet, "")
        status, usage = self._reap(snippet)
        del self.running[snippet.pid]
        if snippet.init is None:
            self._kill_orphans()
        for fd in (snippet.stdout, snippet.stderr):
            while self._read_pipe(snippet, fd):
                pass
        outcome, error = judge(snippet, status, usage, self.limits)
        for fd in (snippet.stdout, snippet.stderr, snippet.pidfd, snippet.setup):
            if fd in self.selector.get_map():
                self.selector.unregister(fd)
            os.close(fd)
        if snippet.init is None:
            clear(snippet.directory)
        self.free_workers.append(snippet.worker)
        stdout = snippet.printed.decode("utf-8", "replace")
        self._send({"id": snippet.id, "outcome": outcome, "stdout": stdout, "error": error, "seconds": seconds})

    def _reap(self, snippet: Snippet) -> tuple[int, resource.struct_rusage]:
        """How its main process ended and what it used; with a namespace of its own, all it left has ended too."""
        status, usage = os.wait4(snippet.pid, 0)[1:]
        if snippet.init is not None:
            os.kill(snippet.init, signal.SIGKILL)
            os.waitpid(snippet.init, 0)  # which returns when everyone in the namespace is gone
        return status, usage

    def _kill_orphans(self) -> None:
        """Kill and reap whoever was re-parented to us: children that are no running snippet's main process.

        Killing one brings up its own children, until there are none; nobody can join while all are dying.
        """
        while strangers := [pid for pid in child_pids() if pid not in self.running]:
            for pid in strangers:
                os.kill(pid, signal.SIGKILL)
            for pid in strangers:
                os.waitpid(pid, 0)


def child_pids() -> list[int]:
    """Our children, zombies and orphans given to us included."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def judge(snippet: Snippet, status: int, usage: resource.struct_rusage, limits: Limits) -> tuple[str, str]:
    """(outcome, what the model is told) from how the main process ended and what it wrote."""
    setup_error = os.read(snippet.setup, READ_BYTES).decode()
    if setup_error:
        return "infrastructure", f"a snippet's process could not be set up: {setup_error}"
    lines = [line.strip() for line in snippet.complained.decode("utf-8", "replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if snippet.killed_for == "output-limit":
        return "output-limit", f"OutputLimitError: more than {limits.output_bytes:g} bytes"
    if snippet.killed_for == "wall":
        return "timeout", f"TimeoutError: exceeded {limits.wall_seconds:g} s"
    if os.WIFSIGNALED(status):
        return judge_signal(os.WTERMSIG(status), usage, limits)
    if os.WEXITSTATUS(status) != 0:
        if last.partition(":")[0].endswith("MemoryError"):
            return "memory", "MemoryError"
        return "error", last or f"exit code {os.WEXITSTATUS(status)}"
    if snippet.printed.decode("utf-8", "replace").strip():
        return "ok", ""
    return "silent", "(no output: print the result)"


def judge_signal(number: int, usage: resource.struct_rusage, limits: Limits) -> tuple[str, str]:
    """The same for a main process that a signal ended, which was not ours."""
    if number == signal.SIGXCPU or usage.ru_utime + usage.ru_stime >= math.ceil(limits.cpu_seconds):
        return "timeout", f"TimeoutError: exceeded {limits.cpu_seconds:g} s"
    if number == signal.SIGKILL and usage.ru_maxrss * 1024 > 0.8 * (limits.memory_mb << 20):
        return "memory", "MemoryError"  # the kernel ran out before the limit was reached
    return "error", f"Killed: {SIGNAL_NAMES.get(number, f'signal {number}')}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Limits(**json.loads(sys.argv[3])), *sys.argv[4:])
