"""What the warm parent does before its first fork: import the mathematics, and lay its memory out so that forks are cheap.

Forking copies a page table, one entry for each 4 kB; in huge pages of 2 MB, the same memory is forked in a third of the
time. Invariant: what a snippet finds imported and seeded is the same in every fork; the pages change nothing but time.
"""

import ctypes
import gc
from collections.abc import Iterator

MADV_COLLAPSE = 25  # <linux/mman.h>, Linux 6.1
HUGE_PAGE = 2 << 20


def warm_up() -> None:
    """Import what snippets import, let sympy fill its caches, seed; freeze it all, so that forks share the pages."""
    import fractions, itertools, math, statistics  # noqa: E401, F401

    import numpy
    import sympy
    import sympy.core.random

    x = sympy.symbols("x")
    str(sympy.factor(x**4 - 1)), sympy.solve(x**2 - x - 1, x), sympy.primerange(2, 50), sympy.divisor_sigma(28)
    sympy.factorint(360), sympy.simplify((x**2 - 1) / (x - 1)), sympy.integrate(x**2, x), numpy.linalg.inv(numpy.eye(2))
    numpy.random.seed(0)
    sympy.core.random.seed(0)
    gc.collect()
    gc.freeze()
    with open("/proc/self/maps") as file:
        collapse(list(heap_pages(file.read())))


def heap_pages(maps: str) -> Iterator[int]:
    """Addresses of the aligned 2 MB of private, writable, anonymous memory in the text of /proc/self/maps.

    `list(heap_pages("00200000-00700000 rw-p 00000000 00:00 0"))` is `[0x200000, 0x400000]`.
    """
    for line in maps.splitlines():
        span, rights, _, _, _, *name = line.split()
        if rights != "rw-p" or name not in ([], ["[heap]"]):  # a file's pages have its name
            continue
        start, end = (int(address, 16) for address in span.split("-"))
        yield from range(-(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE, HUGE_PAGE)


def collapse(addresses: list[int]) -> int:
    """Put each 2 MB into one huge page; how many could be. A kernel that cannot leaves all as it is."""
    libc = ctypes.CDLL(None)
    return sum(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE) == 0
               for address in addresses)
