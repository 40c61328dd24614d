"""What the kernel keeps from a snippet: it lives in namespaces of its own, and some system calls are refused (seccomp).

The warm parent calls `enter_view` and `become_first_process` and holds a `PidNamespaces`; a child calls `isolate`, then
`give_up_capabilities`, then loads `system_call_filter()`. Invariant: whatever cannot be had is an OSError before any
code runs, never a weaker sandbox; `missing` tries it all in a process of its own, which is how a tier is chosen.
Bubblewrap does the same for a program that it starts; a warm parent must do it for a process that it forks.
"""

import ctypes
import errno
import os
import shutil
import signal
import site
import socket
import struct
import sys
from typing import NoReturn

HOME = "/sandbox"  # a snippet's own directory; /tmp and /dev/shm are links to it
HOME_BYTES = 64 << 20
HOME_FILES = 4096
INSIDE_ID = 1000  # user and group of a snippet as it sees itself

# <linux/sched.h>, <linux/mount.h>, <linux/fcntl.h>, <asm/unistd.h>, <linux/capability.h>
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 1 << 17, 1 << 25, 1 << 26, 1 << 27
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 28, 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 12, 1 << 14, 1 << 18)
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
CAPABILITY_VERSION_3 = 0x20080522

# Read-only in the view, where they exist; beside them only the installation of Python.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime",
          "/etc/alternatives", "/etc/python%d.%d" % sys.version_info[:2])
INSTALLATION = ("bin", "lib", "lib64", "pyvenv.cfg")
DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "shm": HOME}

REFUSED = (  # by name; what a kernel or libseccomp does not know it cannot be asked for either
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp "  # other processes
    "mount umount umount2 mount_setattr open_tree move_mount fsopen fsconfig fsmount fspick pivot_root chroot "
    "unshare setns open_by_handle_at name_to_handle_at quotactl quotactl_fd "
    "keyctl add_key request_key bpf perf_event_open userfaultfd fanotify_init "
    "io_uring_setup io_uring_enter io_uring_register "
    "init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct syslog "
    "iopl ioperm modify_ldt personality vhangup lookup_dcookie uselib nfsservctl "
    "settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname "
    "memfd_create memfd_secret shmget shmat shmctl shmdt semget semop msgget mq_open").split()  # memory no limit counts

libc = ctypes.CDLL(None, use_errno=True)


def missing(root: str, uid: int | None) -> str:
    """Why this kernel refuses namespaces, "" if it does not. `root`: an empty directory; `uid`: as for `isolate`."""
    theirs, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        _try_all(root, uid, ours)
    os.close(ours)
    reason = os.read(theirs, 4096).decode()
    os.close(theirs)
    os.waitpid(pid, 0)
    return reason


def _try_all(root: str, uid: int | None, answer: int) -> NoReturn:
    """In a fork: all that a parent and its child will do; the reason why it cannot be done goes to `answer`."""
    reason = ""
    try:
        if os.geteuid() == 0 and uid is None:
            raise OSError(errno.EPERM, "", "limits on processes spare root, and no other user can be had")
        enter_view(root)
        become_first_process()
        PidNamespaces().enter()
        pid = os.fork()
        if pid == 0:
            isolate(uid)
            give_up_capabilities()
        else:
            os.waitpid(pid, 0)
    except OSError as error:
        reason = f"{error.filename or error}: {os.strerror(error.errno)}"
    finally:
        os.write(answer, reason.encode())
        os._exit(0)


def enter_view(root: str) -> None:
    """Give this process a read-only file system with Python in it and nothing else; it is built on `root`, empty.

    Without the right to mount, a user namespace gives it. Needs Linux 5.12. Raises OSError.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWNS)
    except PermissionError:
        unshare(CLONE_NEWNS | CLONE_NEWUSER)
        _map_ids(uid, gid, uid, gid)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    for path in visible_paths():
        _show(path, root)
    for device in DEVICES:
        _bind(f"/dev/{device}", f"{root}/dev/{device}")
    for name, target in LINKS.items():
        os.symlink(target, f"{root}/dev/{name}")
    _bind("/proc", f"{root}/proc")  # for us; a snippet gets one of its own
    os.mkdir(root + HOME)
    if not os.path.exists(f"{root}/tmp"):  # Python itself may be installed there
        os.symlink(HOME, f"{root}/tmp")
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)
    os.chdir(root)
    _check(libc.syscall(SYS_PIVOT_ROOT or -1, b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def visible_paths() -> list[str]:
    """What a snippet may read: the system's programs and libraries, and those parts of Python that lie elsewhere."""
    prefixes = dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix))
    candidates = [*SYSTEM, *(os.path.join(prefix, part) for prefix in prefixes for part in INSTALLATION)]
    if site.ENABLE_USER_SITE:
        candidates.append(site.getusersitepackages())
    chosen: list[str] = []
    for path in candidates:
        inside = any(path == other or path.startswith(other + "/") for other in chosen)
        if os.path.lexists(path) and not inside:
            chosen.append(path)
    return chosen


def _show(path: str, root: str) -> None:
    """Make `path` visible under `root`, read-only, with what is mounted below it; a link stays a link."""
    if os.path.islink(path):
        os.makedirs(os.path.dirname(root + path), 0o755, exist_ok=True)
        os.symlink(os.readlink(path), root + path)
        return
    _bind(path, root + path)
    attributes = struct.pack("4Q", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    _check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(root + path), AT_RECURSIVE, attributes,
                        len(attributes)), f"mount_setattr {path}")


def _bind(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    if os.path.isdir(source):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        open(target, "x").close()
    mount(source, target, None, MS_BIND | MS_REC)


def become_first_process() -> None:
    """Go on as the first process of a new PID namespace, with whose end, however sudden, the kernel ends all in it.

    The process that called stays outside and waits, to end as we do; if it is killed, so are we.
    """
    unshare(CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        return
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os._exit(os.waitpid(pid, 0)[1] != 0)


class PidNamespaces:
    """A PID namespace for each snippet, whose first process we start and kill: the kernel then kills all in it.

    It is a `sleep`, which costs a tenth of a fork of ours; the snippet itself stays a process like any other, which
    signals can end.
    """

    def __init__(self) -> None:
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        program = shutil.which("sleep", path=os.defpath)
        if program is None:
            raise OSError(errno.ENOENT, "", "sleep")
        self._program = program

    def enter(self) -> int:
        """From here to `leave`, forks of ours are born in a new namespace. Returns the pid of its first process."""
        unshare(CLONE_NEWPID)
        streams = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        return os.posix_spawn(self._program, ["sleep", "infinity"], {}, file_actions=streams)

    def leave(self) -> None:
        """Forks are born in our own namespace again."""
        _check(libc.setns(self._own, CLONE_NEWPID), "setns")


def isolate(uid: int | None) -> None:
    """In a child of a new PID namespace: network, IPC, mounts, directory, /proc and user of its own. `uid` None: ours.

    It ends as an ordinary user, in HOME, with all rights in its own namespaces only: `give_up_capabilities` is next.
    """
    owner, group = (os.geteuid(), os.getegid()) if uid is None else (uid, uid)
    unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    size = f"size={HOME_BYTES},nr_inodes={HOME_FILES},mode=700,uid={owner},gid={group}"
    mount("tmpfs", HOME, "tmpfs", MS_NOSUID | MS_NODEV, size)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")
    _check(libc.sethostname(b"sandbox", 7), "sethostname")
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        _check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")  # a change of user hides /proc/self from us
    unshare(CLONE_NEWUSER)
    _map_ids(INSIDE_ID, INSIDE_ID, owner, group)
    os.chdir(HOME)


def give_up_capabilities() -> None:
    """All of them; with no_new_privs, for good."""
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, bytes(24)), "capset")


def system_call_filter(sockets: bool) -> object | None:
    """A seccomp filter, to be loaded in each child with its `load`; None where libseccomp or its binding is missing.

    It refuses, as EPERM, what no calculation needs and attacks on a kernel begin with. `sockets`: Unix sockets may be
    opened (a network namespace bounds whom they reach); others never.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError):
        return None
    refuse = seccomp.ERRNO(errno.EPERM)
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in REFUSED:
        try:
            rules.add_rule(refuse, name)
        except OSError:  # this libseccomp does not know it
            continue
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags lie in memory; libc then calls clone
    for flag in (CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET):
        rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    if sockets:
        rules.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.NE, socket.AF_UNIX))
    else:
        rules.add_rule(refuse, "socket")
    return rules


def unshare(flags: int) -> None:
    """The system call. Raises OSError."""
    _check(libc.unshare(flags), f"unshare {flags:#x}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """The system call. Raises OSError."""
    source_, target_, kind_, data_ = (None if text is None else os.fsencode(text)
                                      for text in (source, target, kind, data))
    _check(libc.mount(source_, target_, kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def _map_ids(inside_uid: int, inside_gid: int, uid: int, gid: int) -> None:
    """Name the one user and group that our new user namespace has."""
    lines = {"setgroups": "deny", "uid_map": f"{inside_uid} {uid} 1", "gid_map": f"{inside_gid} {gid} 1"}
    for file, text in lines.items():
        with open(f"/proc/self/{file}", "w") as target:
            target.write(text)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)
