"""What one snippet gets: a process that has given up all it inherited, and Python as if it had just been started.

Runs in a child of the warm parent (sandbox_server.py). Invariant: nothing of the harness can be reached once the code
runs: no descriptor but 0, 1 and 2, no handler, no variable. Three tiers, strongest first (docs/sandbox.md): namespaces
(isolation.py); where they are refused, Landlock (landlock.py); else little more than limits. Where we are root, a uid
of its own, so that a snippet cannot signal others. Limits, no_new_privs and, where libseccomp is installed, a filter of
system calls belong to all.
"""

import atexit
import ctypes
import math
import os
import random
import resource
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from dataclasses import dataclass
from typing import NoReturn

from thor import isolation, landlock

SETUP = 3  # the descriptor on which a child says that it could not be confined
FILE_BYTES = 64 << 20
MAX_FILES = 256
MAX_PROCESSES = 64  # of one snippet that has a uid of its own
SHARED_PROCESSES = 1024  # that all snippets may add to those of a user who is not root

# <linux/prctl.h> and <linux/capability.h>
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 36, 38, 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
RIGHTS_TO_GIVE_UIDS = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 7  # CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID
FIRST_UID, NUM_UIDS = 61_000, 4_000  # ids that no login uses and that containers map

TIERS = {"best": "the strongest that the kernel allows", "strict": "namespaces and seccomp, or none",
         "basic": "no namespaces"}
libc = isolation.libc


@dataclass(frozen=True)
class Limits:
    """What one snippet may use; the same fields as LocalSandbox's arguments."""

    num_workers: int
    wall_seconds: float
    cpu_seconds: float
    memory_mb: int
    output_bytes: int


@dataclass(frozen=True)
class Tier:
    """What keeps snippets in: chosen once, before anything is imported. `first_uid` None: our own uid."""

    namespaces: bool
    first_uid: int | None
    landlock: bool  # where there are no namespaces
    filter: object | None  # of system calls
    missing: str  # why it is not the strongest; "" if it is

    def __str__(self) -> str:
        parts = {"user+pid+net+mount+ipc+uts namespaces": self.namespaces, "read-only file system": self.namespaces,
                 "a uid of its own": self.first_uid is not None, "landlock": self.landlock,
                 "rlimits": True, "no_new_privs": True, "seccomp": self.filter is not None}
        return ", ".join(name for name, there in parts.items() if there)


def choose_tier(directory: str, wanted: str) -> Tier:
    """The strongest tier there is (`wanted` is "best"), the strongest or none ("strict"), or one without namespaces.

    Raises ValueError for "strict" where something is missing.
    """
    first_uid, reasons = first_own_uid(directory), []
    if wanted == "basic":
        reasons.append("namespaces were not asked for")
    elif refusal := isolation.missing(directory, first_uid):
        reasons.append(f"no namespaces ({refusal})")
    namespaces = not reasons
    calls = isolation.system_call_filter(sockets=namespaces)
    if calls is None:
        reasons.append("no seccomp (libseccomp or the package pyseccomp is missing)")
    if wanted == "strict" and reasons:
        raise ValueError(f"the strict sandbox is not to be had here: {', '.join(reasons)}")
    return Tier(namespaces, first_uid, not namespaces and landlock.version() >= 1, calls, ", ".join(reasons))


@dataclass(frozen=True)
class Confinement:
    """What a child gives up: worked out once, so that a fork has little to do."""

    parent: int
    null: int  # a descriptor of /dev/null
    num_fds: int
    rlimits: list[tuple[int, tuple[int, int]]]
    tier: Tier

    def uid(self, worker: int) -> int | None:
        """Each worker's own, where there are any to give."""
        first = self.tier.first_uid
        return None if first is None else FIRST_UID + (first - FIRST_UID + worker) % NUM_UIDS


def plan_confinement(tier: Tier, limits: Limits) -> Confinement:
    """Limits no higher than those we run under ourselves."""
    cpu, memory = math.ceil(limits.cpu_seconds), _virtual_memory() + (limits.memory_mb << 20)
    counted_alone = tier.namespaces or tier.first_uid is not None
    processes = MAX_PROCESSES if counted_alone else _tasks_of_user() + SHARED_PROCESSES
    wanted = [(resource.RLIMIT_CPU, cpu, cpu + 1), (resource.RLIMIT_AS, memory, memory),
              (resource.RLIMIT_NPROC, processes, processes), (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
              (resource.RLIMIT_NOFILE, MAX_FILES, MAX_FILES), (resource.RLIMIT_CORE, 0, 0)]
    rlimits = []
    for kind, soft, hard in wanted:
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        rlimits.append((kind, (soft, hard)))
    null = os.open(os.devnull, os.O_RDONLY)
    return Confinement(os.getpid(), null, os.sysconf("SC_OPEN_MAX"), rlimits, tier)


def first_own_uid(directory: str) -> int | None:
    """Where the snippets' uids start, other ones for each parent; None unless we are root and may give them.

    A uid of its own is also what makes RLIMIT_NPROC work: it counts by uid and spares root.
    """
    with open("/proc/self/status") as file:
        rights = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    if os.geteuid() != 0 or rights & RIGHTS_TO_GIVE_UIDS != RIGHTS_TO_GIVE_UIDS:
        return None
    try:
        for uid in (FIRST_UID, FIRST_UID + NUM_UIDS, 0):  # a user namespace may not have them
            os.chown(directory, uid, uid)
    except OSError:
        return None
    return FIRST_UID + os.getpid() * 64 % NUM_UIDS


@dataclass(frozen=True)
class Newborn:
    """What a forked child knows: its code, its place, and its pipes for stdout, stderr and what goes wrong here."""

    code: str
    directory: str
    worker: int
    pipes: list[int]
    confinement: Confinement


def run_child(child: Newborn) -> NoReturn:
    """In the forked child: confine it, then run the code."""
    status = 1
    try:
        for target, source in enumerate((child.confinement.null, *child.pipes)):
            os.dup2(source, target)
        os.closerange(SETUP + 1, child.confinement.num_fds)
        try:
            confine(child.directory, child.confinement.uid(child.worker), child.confinement)
        except (OSError, ValueError, MemoryError) as error:
            os.write(SETUP, repr(error).encode())
        else:
            status = run_code(child.code)
    finally:
        os._exit(status)


def confine(directory: str, uid: int | None, confinement: Confinement) -> None:
    """The one place where a child gives up what it inherited: session, rights, limits, environment, streams."""
    os.setsid()
    if uid is not None:
        for stream in (1, 2):
            os.chown(stream, uid, uid)  # or it could not open /dev/stdout
    if confinement.tier.namespaces:
        isolation.isolate(uid)
    elif uid is not None:
        take_uid(uid, directory)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the uid, a change of which resets it
    if not confinement.tier.namespaces and os.getppid() != confinement.parent:
        os._exit(1)  # in a namespace its first process sees to that
    if confinement.tier.landlock:
        landlock.restrict(directory)
    for kind, limit in confinement.rlimits:
        resource.setrlimit(kind, limit)
    os.chdir(directory)
    os.environ.update(HOME=directory, TMPDIR=directory)
    tempfile.tempdir = None
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)
    if confinement.tier.namespaces:
        isolation.give_up_capabilities()
    if confinement.tier.filter is not None:
        confinement.tier.filter.load()
    os.close(SETUP)


def take_uid(uid: int, directory: str) -> None:
    """From root to an ordinary user with a directory, who may read what root may (Python can lie in root's home)."""
    os.chown(directory, uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    prctl(PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)
    header = struct.pack("Ii", isolation.CAPABILITY_VERSION_3, 0)
    for kept in (1 << CAP_DAC_READ_SEARCH, 1 << CAP_DAC_OVERRIDE, 0):  # the first that we have ourselves
        if libc.capset(header, struct.pack("6I", kept, kept, kept, 0, 0, 0)) == 0:
            break
    for right in (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE):
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, right, 0, 0)  # for the programs that it starts, where kept


def run_code(code: str) -> int:
    """Run the snippet as `python` would run a file, in a namespace of its own; returns the exit code."""
    random.seed(0)  # Python seeds it afresh in every fork; numpy's and sympy's generators are as warm_up left them
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__builtins__ = __builtins__
    sys.argv = ["code.py"]
    sys.path.insert(0, "")
    sys.setrecursionlimit(sys.getrecursionlimit() + sum(1 for _ in traceback.walk_stack(None)))
    atexit._clear()
    try:
        exec(compile(code, "<code>", "exec", dont_inherit=True), module.__dict__)
        status = 0
    except SystemExit as end:
        status = exit_status(end)
    except MemoryError:
        os.write(2, b"MemoryError\n")  # there may be no room for more
        status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__.tb_next)
        status = 1
    end_python()
    return status


def exit_status(end: SystemExit) -> int:
    """What `sys.exit(…)` means: nothing is 0, a number is itself, anything else is printed and means 1."""
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def end_python() -> None:
    """What the interpreter does before it exits: wait for threads, call the snippet's own exit handlers, flush."""
    for last_act in (threading._shutdown, atexit._run_exitfuncs, sys.__stdout__.flush, sys.__stderr__.flush):
        try:
            last_act()
        except Exception:  # whatever the snippet made of it: its result stands
            continue


def clear(directory: str) -> None:
    """Undo what a snippet did to its directory. An untouched one serves again: deleting can take milliseconds."""
    try:
        untouched = os.lstat(directory).st_mode == stat.S_IFDIR | 0o700 and not os.listdir(directory)
    except OSError:  # it is gone, or something else now
        untouched = False
    if not untouched:
        remove(directory)


def remove(directory: str) -> None:
    """Delete a directory, also one with parts that are read-only, or nested deeper than Python can follow."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        if os.path.lexists(directory):
            subprocess.run([*command, directory], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)


def prctl(option: int, value: int) -> None:
    """The system call. Raises OSError."""
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _virtual_memory() -> int:
    """Bytes of address space that this process has, which its children start with."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _tasks_of_user() -> int:
    """Processes and threads of our real user, which is what RLIMIT_NPROC counts."""
    count = 0
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:  # it has ended
            continue
    return count
