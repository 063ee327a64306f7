"""A filter of system calls (seccomp) for a process that hears its text over a pipe: no call by which a message could be
had that lies in no file.

Namespaces do not part all that a kernel keeps: keyrings go from parent to child, and a lock on a file, a look at what
is cached of it or a watch on it is seen by every process that can open it. What reads another process's memory, and
what makes namespaces, mounts and programs in the kernel, is refused too. The rest of the calls are as they were.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Mapping

CALLS: Mapping[str, tuple[int, int]] = {
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "flock": (73, 32), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "cachestat": (451, 451),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "open_by_handle_at": (304, 265), "perf_event_open": (298, 241), "bpf": (321, 280),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
}  # fmt: skip
"""What is refused, with its numbers on x86_64 and aarch64."""
FCNTL, LOCKS = (72, 25), (5, 6, 7, 36, 37, 38)
"""fcntl, and those of its commands that set a lock or ask about one."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Which of the numbers, and how the kernel names the machine."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
OTHER_NUMBERS = 0x40000000
"""From here on x86_64 has the same calls once more."""


def install() -> bool:
    """Refuse the calls to this thread, and those it starts, for good, with EPERM; False, and nothing has changed, where
    the system has no filters or another machine's numbers."""
    if not sys.platform.startswith("linux") or os.uname().machine not in MACHINES:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    code = program(*MACHINES[os.uname().machine])
    held = ctypes.create_string_buffer(code, len(code))
    given = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, which the next call asks for
    return libc.prctl(22, 2, ctypes.c_char_p(given), 0, 0) == 0


def program(column: int, machine: int) -> bytes:
    """Write the filter in the kernel's eight-byte instructions: an operation, how many to skip where it holds and where
    it does not, a value."""
    calls = [numbers[column] for numbers in CALLS.values()]
    steps = [(LOAD, "", "", 4), (EQUAL, "", "refuse", machine), (LOAD, "", "", 0)]
    steps += [(AT_LEAST, "refuse", "", OTHER_NUMBERS)] + [(EQUAL, "refuse", "", number) for number in calls]
    steps += [(EQUAL, "", "allow", FCNTL[column]), (LOAD, "", "", 24)]
    steps += [(EQUAL, "refuse", "", command) for command in LOCKS]
    ends = {"allow": len(steps), "refuse": len(steps) + 1}
    steps += [(RETURN, "", "", ALLOW), (RETURN, "", "", REFUSE)]

    def skip(at: int, to: str) -> int:
        return ends[to] - at - 1 if to else 0

    return b"".join(
        struct.pack("=HBBI", operation, skip(at, holds), skip(at, fails), value)
        for at, (operation, holds, fails, value) in enumerate(steps)
    )
