"""The warm parent's memory: which pages are collapsed, and that nothing is lost by it."""

import mmap
import ctypes

from thor.sandbox_warm import HUGE_PAGE, collapse, heap_pages

ANONYMOUS = "00000000 00:00 0"


def test_whole_aligned_pages_of_anonymous_memory_are_found():
    maps = f"00300000-00900000 rw-p {ANONYMOUS}\n00a00000-00c00000 rw-p {ANONYMOUS}   [heap]\n"
    assert list(heap_pages(maps)) == [0x400000, 0x600000, 0xa00000]


def test_what_is_smaller_than_a_huge_page_has_none():
    assert list(heap_pages(f"00300000-005ff000 rw-p {ANONYMOUS}\n")) == []


def test_files_stacks_shared_and_read_only_memory_are_left_alone():
    maps = (f"00400000-00800000 r-xp {ANONYMOUS}\n00400000-00800000 rw-s {ANONYMOUS}\n00400000-00800000 r--p {ANONYMOUS}\n"
            f"00400000-00800000 rw-p {ANONYMOUS}   [stack]\n00400000-00800000 rw-p 00001000 08:01 77   /usr/lib/a file.so\n")
    assert list(heap_pages(maps)) == []


def test_the_contents_survive():
    memory = mmap.mmap(-1, 4 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pattern = bytes(range(251)) * (4 * HUGE_PAGE // 251)
    memory.write(pattern)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    assert collapse([first, first + HUGE_PAGE]) in (0, 2)  # 0: a kernel that cannot
    assert memory[:len(pattern)] == pattern


def test_memory_that_is_not_there_is_not_counted():
    assert collapse([1 << 46]) == 0
