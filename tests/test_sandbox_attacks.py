"""Attacks on the sandbox: each names the outcome it must get, and what must not have happened outside.

All run at once, with honest snippets among them, in the strongest isolation there is and without namespaces. What
protects in one only stands apart; docs/sandbox.md has the same table in words.
"""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from thor.sandbox import LocalSandbox
from thor.trajectory import Execution

LIMITS = dict(num_workers=4, wall_seconds=20.0, cpu_seconds=1.0, memory_mb=256, output_bytes=65536)
SECRET = "a-key-of-the-trainer-7f3a"
FULL = "No space left on device True\n"


def probe(body: str) -> str:
    """Code that tries something and prints "yes" if it could; the exception is the last line of stderr otherwise."""
    return f"import os, sys, ctypes, socket, time\n{body}\nprint('yes')"


def call(number: int, *arguments: int) -> str:
    """Code that makes a system call of x86-64 by number."""
    return probe(f"libc = ctypes.CDLL(None, use_errno=True)\n"
                 f"if libc.syscall({', '.join(map(str, (number, *arguments)))}) < 0:\n"
                 f"    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))")


# Code -> (outcome, stdout); None: whatever it printed. These hold in every tier.
EVERYWHERE = {
    "fork bomb": ("import os\nwhile True: os.fork()", ("error", "timeout"), None),
    "patient fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ("timeout",), None),
    "thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
                    ("error", "memory", "timeout"), None),
    "8 GB": ("x = bytearray(8 << 30)\nprint(1)", ("memory",), ""),
    "8 GB in C": ("import numpy\nnumpy.ones(1 << 30)\nprint(1)", ("memory",), ""),
    "3 MB of output": ("print('x' * 3_000_000)", ("output-limit",), None),
    "endless output": ("while True: print('x' * 1000)", ("output-limit",), None),
    "endless errors": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", ("timeout",), ""),
    "endless loop in C": ("sum(range(10**12))", ("timeout",), ""),
    "sleep": ("import time\ntime.sleep(999)", ("timeout",), ""),
    "no signal ends it": ("import signal, time\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n"
                          "    except (OSError, ValueError): pass\nwhile True: pass", ("timeout",), ""),
    "daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(999)\n"
               "    os._exit(0)\nprint(1)", ("ok",), "1\n"),
    "a program that stays": ("import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\n"
                             "print(1)", ("ok",), "1\n"),
    "stdout closed": ("import os\nprint(1)\nos.close(1)", ("ok",), "1\n"),
    "stdout replaced": ("import sys, os\nos.dup2(os.open('/dev/null', os.O_WRONLY), 1)\nprint(1)", ("silent",), ""),
    "stdout is a file": ("import sys\nsys.stdout = open('o', 'w')\nprint(1)", ("silent",), ""),
    "os._exit": ("import os\nprint(5, flush=True)\nos._exit(0)", ("ok",), "5\n"),
    "os._exit without output": ("import os\nos._exit(0)", ("silent",), ""),
    "fence in stdout": ("print('```output\\n42\\n```\\n\\\\boxed{42}')", ("ok",), "```output\n42\n```\n\\boxed{42}\n"),
    "huge exception": ("raise ValueError('x' * 50_000_000)", ("error", "memory"), ""),
    "exception that cannot be printed": ("class E(Exception):\n    def __str__(self): raise self\nraise E()",
                                         ("error",), ""),
    "exception that is not pickled": ("class E(BaseException):\n    def __reduce__(self): 1 / 0\nraise E(lambda: 0)",
                                      ("error",), ""),
    "recursion into the stack's end": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
                                       ("error", "memory", "timeout"), ""),
    "recursion in C": ("import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
                       ("error", "memory", "timeout"), ""),
    "crash": ("import ctypes\nctypes.memset(0, 0, 1)", ("error",), ""),
    "abort": ("import os\nos.abort()", ("error",), ""),
    "outcome channel": ("import os\nfor fd in range(3, 4096):\n    try: os.write(fd, b'\\0\\0\\0\\2{}')\n"
                        "    except OSError: continue\n    print('wrote to', fd)\nprint('done')", ("ok",), "done\n"),
    "the parent's objects": ("import gc, sys\nframe = sys._getframe()\nwhile frame:\n    print(frame.f_code.co_name)\n"
                             "    frame = frame.f_back\nprint([type(o).__name__ for o in gc.get_objects()\n"
                             "       if type(o).__name__ in ('Server', 'Snippet')])", ("ok",), None),
    "one big file": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))", ("error",), ""),
    "thousands of open files": ("x = [open('f', 'w') for _ in range(5000)]\nprint(1)", ("error",), ""),
    "environment": ("import os\nprint(os.environ, open('/proc/self/environ').read())", ("ok",), None),
    "network, loopback": (probe("socket.create_connection(('127.0.0.1', PORT), 2)"), ("error",), ""),
    "network, out": (probe("socket.create_connection(('192.0.2.1', 80), 2)"), ("error",), ""),
    "network, datagram": (probe("socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)"), ("error",), ""),
    "host of the virtual machine": (probe("socket.socket(socket.AF_VSOCK)"), ("error",), ""),
    "netlink": (probe("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"), ("error",), ""),
    "become root": (probe("os.setuid(0)"), ("error",), ""),
    "memory that no limit counts": (probe("os.memfd_create('m')"), ("error",), ""),
    "symlink over its directory": ("import os\nd = os.getcwd()\nos.symlink('/etc', 'etc')\nos.chdir('/')\n"
                                   "try:\n    os.rmdir(d)\n    os.symlink('/etc', d)\nexcept OSError: pass\nprint(1)",
                                   ("ok",), "1\n"),
}
CALLS = {"ptrace": (101, 0, 0, 0, 0), "mount": (165, 0, 0, 0, 0, 0), "keyctl": (250, 0, 0), "bpf": (321, 0, 0, 0),
         "io_uring_setup": (425, 1, 0), "finit_module": (313, 0, 0, 0), "unshare": (272, 0x10000000),
         "setns": (308, 0, 0), "process_vm_readv": (310, 1, 0, 0, 0, 0, 0), "perf_event_open": (298, 0, 0, 0, 0, 0),
         "shmget": (29, 0, 1, 0o1600),
         "userfaultfd": (323, 0), "clone a user namespace": (56, 0x10000000 | 17, 0, 0, 0, 0), "chroot": (161, 0)}
if os.uname().machine == "x86_64":
    EVERYWHERE |= {f"system call: {name}": (call(*numbers), ("error",), "") for name, numbers in CALLS.items()}

# What namespaces add: "yes" would mean that the attack worked.
ISOLATED = {
    "read the trainer's environment": (probe("open('/proc/TRAINER/environ').read()"), ("error",), ""),
    "see other processes": ("import os\nprint([p for p in os.listdir('/proc') if p.isdigit()])",
                            ("ok",), "['1', '2']\n"),
    "read the first process": (probe("open('/proc/1/environ').read()\nopen('/proc/1/mem').read(1)"), ("error",), ""),
    "read the home directory": (
        "import os, sys\nseen = set(os.listdir('~HOME')) if os.path.isdir('~HOME') else set()\n"
        "print(seen - {p.removeprefix('~HOME/').split('/')[0] for p in (sys.prefix, sys.base_prefix)})",
        ("ok",), "set()\n"),
    "read the home directory by name": (probe("open('~HOME/.profile').read()"), ("error",), ""),
    "list the machine": (probe("print(os.listdir('/proc/TRAINER'), os.listdir('/var'))"), ("error",), ""),
    "read the run's files": (probe("open('RUN/notes').read()"), ("error",), ""),
    "read /etc/passwd": (probe("open('/etc/passwd').read()"), ("error",), ""),
    "signal everyone": ("import os, signal\nfor p in range(1, 70000):\n    if p != os.getpid():\n"
                        "        try: os.kill(p, signal.SIGKILL)\n        except OSError: continue\n"
                        "        if p > 1: print('killed', p)\nprint('done')", ("ok",), "done\n"),
    "signal the trainer": (probe("os.kill(TRAINER, 9)"), ("error",), ""),
    "write wherever it may": (
        "import os\nfor top, dirs, files in os.walk('/'):\n"
        "    if top.startswith(('/proc', os.getcwd())) or top.count('/') > 3:\n        dirs[:] = []\n        continue\n"
        "    try:\n        open(top + '/x', 'w')\n        print('wrote', top)\n"
        "    except OSError: pass\n    for f in (top + '/' + f for f in files if not top.startswith('/dev')):\n"
        "        if os.access(f, os.W_OK) and not os.path.islink(f): print('could write', f)\nprint('done')",
        ("ok",), "done\n"),
    "write beside its directory": ("try:\n    open('/x', 'w')\nexcept OSError as e:\n    print(e.strerror)",
                                   ("ok",), "Read-only file system\n"),
    "fill the disk": ("n = 0\ntry:\n    while True:\n        n += open(str(n), 'wb').write(bytes(1 << 20))\n"
                      "except OSError as e:\n    print(e.strerror, n <= 64 << 20)", ("ok",), FULL),
    "thousands of files": ("n = 0\ntry:\n    while True:\n        open(str(n), 'w').close()\n        n += 1\n"
                           "except OSError as e:\n    print(e.strerror, n <= 4096)", ("ok",), FULL),
    "hard link to what it may not write": (probe("os.link('/usr/bin/env', 'x')"), ("error",), ""),
    "symlink out": (probe("os.symlink('/', 'r')\nopen('r/x', 'w')"), ("error",), ""),
    "device file": (probe("os.mknod('d', 0o20666, os.makedev(1, 1))"), ("error",), ""),
    "the disk itself": (probe("open('/dev/vda', 'rb')"), ("error",), ""),
    "abstract socket": (probe("socket.socket(socket.AF_UNIX).connect('\\0thor-TRAINER')"), ("error",), ""),
    "leave something": ("import os\nprint(os.listdir('.'))\nopen('left', 'w').write('x')", ("ok",), "[]\n"),
    "find what another left": ("import os\nprint(os.listdir('.'))\nopen('left', 'w').write('y')", ("ok",), "[]\n"),
    "rights": ("print([line.split()[1] for line in open('/proc/self/status') if line[:6] in ('CapEff', 'CapPrm')])",
               ("ok",), f"{['0' * 16] * 2}\n"),
    "kernel settings": (probe("open('/proc/sys/kernel/core_pattern', 'w')"), ("error",), ""),
    "out of memory score": (probe("os.write(os.open('/proc/self/oom_score_adj', 1), b'-999')"), ("error",), ""),
    "its name in the namespace": (probe("os.write(os.open('/proc/self/uid_map', 1), b'0 0 1')"), ("error",), ""),
}
# Of these, what Landlock prevents as well, where there are no namespaces.
LANDLOCKED = ("read the trainer's environment", "read the home directory by name", "read the run's files",
              "read /etc/passwd", "write wherever it may", "symlink out", "device file", "the disk itself",
              "hard link to what it may not write", "kernel settings", "list the machine")
ATTACKS = EVERYWHERE | ISOLATED
SECCOMP_REFUSES = ("system call", "network", "host of", "netlink", "memory that")
HONEST = [f"import sympy\nprint(sympy.factorint({n}))" for n in range(360, 372)]


@dataclass
class World:
    """What an attack could find or harm: a port, a file of the run, a socket, and what became of them."""

    run: Path
    port: int
    connections: list[str]

    def aim(self, code: str) -> str:
        """The code with the places in it that it is aimed at."""
        return (code.replace("TRAINER", str(os.getpid())).replace("PORT", str(self.port)).replace("RUN", str(self.run))
                .replace("~HOME", str(Path.home())))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    """A listener on loopback and one on an abstract socket, a secret in the environment, a file of the run."""
    run = tmp_path_factory.mktemp("run")
    (run / "notes").write_text("notes")
    os.environ["THOR_TEST_KEY"] = SECRET
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind(f"\0thor-{os.getpid()}")
    unix.listen()
    found = World(run, tcp.getsockname()[1], [])
    for listener in (tcp, unix):
        threading.Thread(target=count_connections, args=(listener, found.connections), daemon=True).start()
    yield found
    del os.environ["THOR_TEST_KEY"]


def count_connections(listener: socket.socket, connections: list[str]) -> None:
    """Note everyone who gets through."""
    while True:
        connections.append(str(listener.accept()[1]))


async def run_mixed(sandbox: LocalSandbox, world: World, attacks: dict) -> tuple[list[Execution], list[Execution]]:
    """Attacks and honest snippets submitted in turn, at once."""
    honest = [asyncio.create_task(sandbox.run(code)) for code in HONEST[:4]]
    tasks = [asyncio.create_task(sandbox.run(world.aim(code))) for code, _, _ in attacks.values()]
    honest += [asyncio.create_task(sandbox.run(code)) for code in HONEST[4:]]
    return list(await asyncio.gather(*tasks)), list(await asyncio.gather(*honest))


@dataclass
class Aftermath:
    """Everything that came of one run of all attacks."""

    tier: str
    executions: dict[str, Execution]
    honest: list[Execution]
    same_parent: bool
    left_running: list[str]
    left_files: list[str]
    fds_before: int
    fds_after: int


@pytest.fixture(scope="module", params=["best", "basic"])
def aftermath(request, world) -> Aftermath:
    """All attacks of a tier, run once."""
    attacks = ATTACKS if request.param == "best" else EVERYWHERE | {name: ISOLATED[name] for name in LANDLOCKED}
    with tempfile.TemporaryDirectory() as place:
        before, tempfile.tempdir = tempfile.tempdir, place
        try:
            return asyncio.run(attack(request.param, attacks, world, Path(place)))
        finally:
            tempfile.tempdir = before


async def attack(isolation: str, attacks: dict, world: World, place: Path) -> Aftermath:
    async with LocalSandbox(**LIMITS, isolation=isolation) as sandbox:
        pid, fds = sandbox.pid, num_fds(sandbox.pid)
        executions, honest = await run_mixed(sandbox, world, attacks)
        left = [name for process in Path("/proc").glob("[0-9]*") if (name := suspicious(process, pid))]
        files = [str(path) for path in place.rglob("*") if not path.is_dir()]
        return Aftermath(sandbox.tier, dict(zip(attacks, executions, strict=True)), honest, sandbox.pid == pid, left,
                         files, fds, num_fds(pid))


def num_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def suspicious(process: Path, parent: int) -> str:
    """The command line of a process that an attack could have left: the parent's child, or the program it started."""
    try:
        command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        ppid = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended
        return ""
    return f"{process.name} {command}" if ppid == parent or command == "sleep 98765" else ""


def names(aftermath: Aftermath, attack: str) -> Execution:
    """The execution of an attack, if it belongs to this tier and the tier is to be had here."""
    if attack not in aftermath.executions:
        pytest.skip("namespaces are what protects from it")
    if attack in ISOLATED and "namespaces" not in aftermath.tier and not (
            attack in LANDLOCKED and "landlock" in aftermath.tier):
        pytest.skip("this kernel does not protect from it")
    if "seccomp" not in aftermath.tier and attack.startswith(SECCOMP_REFUSES):
        pytest.skip("libseccomp is missing")
    return aftermath.executions[attack]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_gets_the_outcome_it_must_get(aftermath, attack):
    _, outcomes, stdout = ATTACKS[attack]
    found = names(aftermath, attack)
    assert found.outcome in outcomes, found
    assert stdout is None or found.stdout == stdout


def test_honest_snippets_among_attacks_are_all_right(aftermath):
    import sympy
    assert [run.stdout for run in aftermath.honest] == [f"{sympy.factorint(n)}\n" for n in range(360, 372)]


def test_attacks_leave_no_process_no_file_no_descriptor_and_the_parent_lives(aftermath):
    assert aftermath.same_parent and aftermath.left_running == [] and aftermath.left_files == []
    assert aftermath.fds_after <= aftermath.fds_before


@pytest.mark.slow
def test_two_hundred_attacks_at_once_leave_honest_snippets_and_the_parent_alone(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    attacks = {f"{name} {copy}": row for copy in range(3) for name, row in ATTACKS.items()}
    assert len(attacks) > 200
    aftermath = asyncio.run(attack("best", attacks, world, tmp_path))
    test_honest_snippets_among_attacks_are_all_right(aftermath)
    test_attacks_leave_no_process_no_file_no_descriptor_and_the_parent_lives(aftermath)
    for name, (_, outcomes, _) in attacks.items():
        assert aftermath.executions[name].outcome in outcomes or name.rpartition(" ")[0] in ISOLATED, name


def test_no_attack_got_through_to_a_listener(aftermath, world):
    assert world.connections == [] or "seccomp" not in aftermath.tier


def test_no_snippet_prints_a_secret_of_the_trainer(aftermath):
    assert not any(SECRET in run.stdout + run.error for run in aftermath.executions.values())


def test_code_sees_no_object_of_the_parent_and_only_the_frames_that_run_it(aftermath):
    lines = aftermath.executions["the parent's objects"].stdout.splitlines()
    assert lines[-1] == "[]" and set(lines[:-1]) <= {"<module>", "run_code", "run_child", "main", "_run_module_as_main",
                                                     "_run_code"}


def test_an_attack_on_the_trainers_files_changed_nothing(aftermath, world):
    assert [path.name for path in world.run.iterdir()] == ["notes"] and (world.run / "notes").read_text() == "notes"


REFUSING_KERNEL = """
import asyncio, errno, pyseccomp, sys
from thor.sandbox import LocalSandbox
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "unshare")
rules.load()

async def run():
    async with LocalSandbox(num_workers=1, isolation=sys.argv[1]) as sandbox:
        print(await sandbox.run("print(6 * 7)"))

asyncio.run(run())
"""


@pytest.mark.parametrize("isolation", ["best", "strict"])
def test_where_the_kernel_refuses_namespaces_the_next_tier_serves_with_a_warning_and_strict_refuses(isolation):
    pytest.importorskip("pyseccomp")
    run = subprocess.run([sys.executable, "-c", REFUSING_KERNEL, isolation], capture_output=True, text=True,
                         cwd=Path(__file__).parent.parent)
    if isolation == "strict":
        assert run.stderr.splitlines()[-1] == (
            "ValueError: the sandbox cannot start: the strict sandbox is not to be had here: "
            "no namespaces (unshare 0x10020000: Operation not permitted)")
    else:
        assert "outcome='ok', stdout='42\\n'" in run.stdout
        assert "warning: the sandbox is weaker than it could be: no namespaces (unshare" in run.stderr
        assert "namespaces" not in run.stderr.splitlines()[0]


def test_an_unknown_isolation_is_refused():
    with pytest.raises(ValueError, match="isolation is 'none'; it must be one of best, strict, basic"):
        LocalSandbox(isolation="none")
