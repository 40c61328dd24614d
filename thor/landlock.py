"""Which files a snippet may use where namespaces are refused: Landlock needs no rights, and most containers allow it.

Invariant: once `restrict` returns, this process and all it starts read what `isolation.visible_paths` names and write
below their own directory (and in /dev/shm, for multiprocessing), whoever they are; they can neither trace nor, from
Linux 6.12 on, signal or reach by socket anyone who is not restricted with them.
"""

import ctypes
import os
import struct

from thor.isolation import DEVICES, libc, visible_paths

# <asm/unistd.h>, <linux/landlock.h>
SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
ALL_OF_FIRST, REFER, TRUNCATE = (1 << 13) - 1, 1 << 13, 1 << 14
TCP_BIND_AND_CONNECT, SIGNALS_AND_ABSTRACT_SOCKETS = 0b11, 0b11
OF_DIRECTORIES = ~(EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE)  # rights that a file cannot be given


def version() -> int:
    """Of the kernel's Landlock: 1 to 7 and more; below 1 where there is none."""
    return libc.syscall(SYS_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)


def restrict(directory: str) -> None:
    """Restrict this process and its children for good; it must have no_new_privs. Raises OSError."""
    known = version()
    handled = ALL_OF_FIRST | (known >= 2 and REFER) | (known >= 3 and TRUNCATE)
    attributes = struct.pack("3Q", handled, (known >= 4) * TCP_BIND_AND_CONNECT,
                             (known >= 6) * SIGNALS_AND_ABSTRACT_SOCKETS)[:8 if known < 4 else 16 if known < 6 else 24]
    rules = _checked(libc.syscall(SYS_CREATE_RULESET, attributes, len(attributes), 0))
    for path in (*visible_paths(), "/proc/self"):
        _allow(rules, path, EXECUTE | READ_FILE | READ_DIR)
    for path in (directory, "/dev/shm", *(f"/dev/{device}" for device in DEVICES)):
        _allow(rules, path, handled & ~EXECUTE if path.startswith("/dev/") else handled)
    _checked(libc.syscall(SYS_RESTRICT_SELF, rules, 0))
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    """Allow something at and below a path; what is not there cannot be allowed."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= ~OF_DIRECTORIES
    _checked(libc.syscall(SYS_ADD_RULE, rules, RULE_PATH_BENEATH, struct.pack("=Qi", rights, place), 0))
    os.close(place)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "landlock")
    return result
