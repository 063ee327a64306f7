"""A process in Linux namespaces of its own: what it was not given is not there to be opened, listed or asked about.

`enter` leaves this process in new user, mount, PID, IPC, UTS and network namespaces, without privileges in them, under
a root that is an empty memory file system with these in it, read only:

- folders of library code, mounted where they were;
- of folders of source code, the code of packages and modules, and the files that may be read: copied while they are
  small, so that nothing comes with them but their bytes and name, mounted where not;
- /proc, of its own processes; of /dev null, zero and urandom; /sys/devices/system, by which libraries know processors.

Where there are NVIDIA devices they are there too, and all of /sys. One folder can be written to, its temporary one, in
memory. Nothing needs a privilege: kernels let a user do this, unless an administrator or a container's rules forbid it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path

NEW = 0x10000000 | 0x00020000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x40000000
"""User, mount, PID, IPC, UTS and network namespaces."""
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXECUTION, REMOUNT, BIND, RECURSIVE = 1, 2, 4, 8, 32, 4096, 16384
PRIVATE, RELATIVE_TIMES, DETACH = 1 << 18, 1 << 21, 2
LARGEST_COPY = 2**26
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
INSTALLED = ("site-packages", "dist-packages")
CODE, NOTES = (".py", ".so"), (".egg-info", ".dist-info")


def enter(folders: Sequence[str], sources: Sequence[str], files: Sequence[str], scratch: str) -> bool:
    """Move this process, which must have one thread and no children, into namespaces of its own; False, and nothing has
    changed, where the system has none for it.

    The rest of the program is a child of the process that called, which waits for it and ends as it does.
    """
    if not sys.platform.startswith("linux") or os.uname().machine not in PIVOT_ROOT:
        return False
    trial = os.fork()
    if not trial:  # a process that gets stuck half-way has no way back
        status = 1
        try:
            _enter(folders, (), files, scratch)  # source code is copied, which is the same everywhere
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(trial, 0)[1]:
        return False
    _enter(folders, sources, files, scratch)
    return True


def _enter(folders: Sequence[str], sources: Sequence[str], files: Sequence[str], scratch: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _check(libc.unshare(NEW), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text, encoding="utf-8")
    child = os.fork()  # the first process of the new PID namespace
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    libc.prctl(1, 9, 0, 0, 0)  # it ends with the one that waits for it
    root = Root(libc, scratch)
    for folder in folders:
        root.bind(folder)
    for folder in sources:
        for name in () if root.has(folder) else code(folder):
            root.bind(name) if os.path.isdir(name) else root.give(name)
    for file in files:
        root.give(file)
    root.enter(scratch)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    none, version = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(libc.capset(version, none), "capset")


def code(folder: str) -> list[str]:
    """List what a folder of the import path has that is code: all of it, as one, where packages are installed; else the
    files of packages, modules and installers' notes. Bytecode is left out: Python takes it for its source's unread."""
    if os.path.basename(folder) in INSTALLED or not os.path.isdir(folder):
        return [folder] if os.path.isdir(folder) else []
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and entry.name.endswith(NOTES):
                found += files(entry.path, "")
            elif entry.is_dir() and os.path.isfile(os.path.join(entry.path, "__init__.py")):
                found += files(entry.path)
            elif entry.name.endswith(CODE):
                found.append(entry.path)
    return sorted(found)


def files(folder: str, ending: str | tuple[str, ...] = CODE) -> list[str]:
    """List the files in a folder and those below whose names end so."""
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names if name.endswith(ending)]


class Root:
    """Makes a root folder."""

    def __init__(self, libc: ctypes.CDLL, place: str) -> None:
        """Begin it, in a mount over the folder `place`."""
        self.libc, self.place, self.bound = libc, place, set[str]()
        self.mount(None, "/", None, RECURSIVE | PRIVATE)
        self.mount("tmpfs", place, "tmpfs", NO_SUID | NO_DEVICES, "mode=755")

    def mount(self, source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
        """Call mount(2); raises OSError."""
        texts = [text.encode() if text else None for text in (source, target, kind, options)]
        status = self.libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3])
        _check(status, f"mount {target}")

    def has(self, name: str) -> bool:
        """Say whether a file or folder is mounted, or in one that is."""
        return any(name == each or name.startswith(each + "/") for each in self.bound)

    def bind(self, name: str, flags: int = READ_ONLY | NO_SUID | NO_DEVICES) -> None:
        """Mount a file or folder where it was, read only; one that is not there is left out."""
        name = os.path.abspath(name)
        if not os.path.exists(name) or self.has(name):
            return
        self.bound.add(name)
        target = self.make(name, os.path.isdir(name))
        self.mount(os.path.realpath(name), target, None, BIND | RECURSIVE)
        held = os.statvfs(target).f_flag  # what the owner of the mount has set may not be taken away
        flags |= held & (NO_EXECUTION | 1024 | 2048) | (RELATIVE_TIMES if held & 4096 else 0)
        self.mount(None, target, None, BIND | REMOUNT | flags)

    def make(self, name: str, folder: bool) -> str:
        """Make an empty folder or file to mount over."""
        target = self.place + name
        os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
        if not folder and not os.path.exists(target):
            open(target, "wb").close()
        return target

    def give(self, file: str) -> None:
        """Put in a file, as a copy of its bytes when that is small."""
        for name in dict.fromkeys((os.path.abspath(file), os.path.realpath(file))):
            if os.path.exists(self.place + name):
                continue
            if os.path.isfile(file) and os.path.getsize(file) <= LARGEST_COPY:
                os.makedirs(os.path.dirname(self.place + name), exist_ok=True)
                shutil.copyfile(file, self.place + name)
                os.utime(self.place + name, (0, 0))
            else:
                self.bind(name)

    def enter(self, scratch: str) -> None:
        """Make it this process's root, with a folder of its own to write to, and leave the old one."""
        nvidia = glob("/dev/nvidia*")
        self.bind("/sys" if nvidia else "/sys/devices/system")
        for device in (*DEVICES, *nvidia):
            self.bind(device, NO_SUID)
        self.mount("proc", self.make("/proc", True), "proc", NO_SUID | NO_DEVICES | NO_EXECUTION)
        self.mount("tmpfs", self.make(scratch, True), "tmpfs", NO_SUID | NO_DEVICES, "mode=700")
        os.chdir(self.place)
        _check(self.libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
        _check(self.libc.umount2(b".", DETACH), "umount")
        self.mount(None, "/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)
        os.chdir(scratch)


def _check(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
