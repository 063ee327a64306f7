"""Work in a fresh process that can open only the files it is told of, and Python's own library code, read only.

`run` starts Python without its environment variables, user folder and site packages (-I -S), with an environment of a
few named variables, and there puts guards up before anything else:

- where Linux lets a user have them, namespaces, in which nothing else is there at all: see `namespaces`;
- an audit hook refuses, and notes, every opening of another file, every write, every socket and every process, and a
  gate among the importers what makes artifacts (training, quantizing, preparing data). They see what goes through
  Python;
- on Linux, Landlock makes the kernel refuse the same of files, for C code too, all TCP, and signals and abstract
  sockets to others: kernel 5.13, TCP 6.7, the last two 6.12;
- and a filter refuses the system calls by which a message could be had that lies in no file: see `system_calls`.

Which of them are up the process says before it imports the work; what they refused, and what it loaded, it says
itself, so that code that wants to can hide it.

Limits. C code may undo a hook, and without namespaces and Landlock it opens what it likes. Without namespaces names,
sizes and attributes of files, and other processes, can be looked at: `weakness` says what is open. It may write into
one folder, its temporary one, empty at first and removed at the end (torch wants one when it is imported).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from hedgemix.audit import namespaces, system_calls
from hedgemix.runtime.switches import SWITCHES

DATA_MAKERS = ("corpus", "dataset", "dataloader", "docstrings", "fineweb")
MAKERS = ("train", "quantize", "recipes", *(f"data.{name}" for name in DATA_MAKERS))
"""What trains, quantizes and prepares text: a score needs none of it."""
FORBIDDEN = (*(f"hedgemix.{name}" for name in MAKERS), "pipeline", "ray")
"""Modules whose import is refused."""
LONGEST_LINE = 1 << 28
GIVE_WAY = 5
"""Added to the niceness of work that nobody talks with. A conversation waits at every word for both of its sides to get
a core, and an audit is as long as the one that it holds."""
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
KERNEL = ("/proc", "/sys", "/dev/null", "/dev/urandom")
KEPT = (*SWITCHES, "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "MKL_NUM_THREADS",
        "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # fmt: skip
"""Variables that the process is given when they are set."""
CODE = re.compile(r"\.(py|pyc|so)$|\.(egg|dist)-info/")
"""What is library code in a folder of the import path: modules, and the notes an installer left beside them."""
START = (
    "import json, sys; spec = json.loads(sys.stdin.readline()); sys.path[:] = spec['path']; "
    "sys.prefix, sys.exec_prefix = spec['prefixes']; from hedgemix.audit import sandbox; sandbox.serve(spec)"
)
PROCESSES = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen")
WRITES = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate")


@dataclass
class Confined:
    """Tells what the guards did: the data files opened, what was refused, Landlock's version (0: the kernel has none),
    and whether there were namespaces and a filter of system calls."""

    opened: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    landlock: int = 0
    namespaces: bool = False
    filtered: bool = False
    loaded: list[str] = field(default_factory=list)
    """Files of code in memory when the work ended, and what else was opened beside packages' code."""

    def guarded_by(self) -> str:
        """Name the guards that were in force."""
        names = ["namespaces"] * self.namespaces + [f"Landlock {self.landlock}"] * (self.landlock > 0)
        return ", ".join([*names, *["a filter of system calls"] * self.filtered, "an audit hook"])

    def weakness(self) -> str:
        """Say what is open without those that were not; empty when nothing known is."""
        open_now = []
        if not self.namespaces:
            by_c = "" if self.landlock else "; C code could open any file"
            open_now.append(f"namespaces: names and sizes of files and other processes could be looked at{by_c}")
        if not self.filtered:
            open_now.append("a filter of system calls: keyrings and locks could be looked at")
        return f"weaker, without {', and without '.join(open_now)}" if open_now else ""


@dataclass(frozen=True)
class Outcome:
    """Holds what the work came to."""

    value: Any
    """What the work returned, through JSON."""
    confined: Confined
    start_seconds: float
    """Until the work began: Python, the guards, the import of the work's module."""


Talk = Callable[[BinaryIO, BinaryIO], None]
"""Reads what the work says, and writes what it hears."""


class WorkError(RuntimeError):
    """Tells that the work raised, or its process died; `refused` is what the guards had refused by then."""

    def __init__(self, message: str, refused: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.refused = list(refused)


def run(
    work: str,
    arguments: Mapping[str, Any],
    readable: Sequence[Path] | None,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    talk: Talk | None = None,
    folders: Sequence[Path] = (),
) -> Outcome:
    """Call `function(**arguments, log=log)` of work = "module:function" in a fresh process; JSON both ways.

    readable: the files it may open; None: an ordinary process, without guards. log receives the records that the work
    logs, as they come. folders: of code, looked for there before the import path. talk: holds a conversation with the
    work over two pipes, whose other ends it is given as `pipe=[number to write to, number to read from]`; what it logs
    meanwhile waits. Raises WorkError when the work fails.
    """
    package = str(Path(__file__).resolve().parent.parent.parent)
    path = [package, *(os.path.abspath(entry) for entry in sys.path)]
    files = None if readable is None else [os.path.realpath(file) for file in readable]
    ends = (os.pipe(), os.pipe()) if talk else None  # what it says, what it hears
    given = [ends[0][1], ends[1][0]] if ends else []
    arguments = {**arguments, "pipe": given} if ends else arguments
    spec = {
        "work": work,
        "arguments": arguments,
        "readable": files,
        "named": [os.path.abspath(file) for file in readable or ()],
        "path": list(dict.fromkeys(path)),
        "folders": [os.path.realpath(folder) for folder in folders],
        "library": sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), *SYSTEM}),
        "prefixes": [sys.prefix, sys.exec_prefix],
        "nice": 0 if talk else GIVE_WAY,
    }
    began, message, start_seconds, confined = time.monotonic(), "", 0.0, Confined()
    ended: dict[str, Any] | None = None
    guards: dict[str, Any] | None = None
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory() as scratch:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=scratch,
            env=environment(os.path.realpath(scratch)),
            pass_fds=given,
        )
        for end in given:
            os.close(end)
        try:
            assert child.stdin and child.stdout
            child.stdin.write(json.dumps(spec).encode() + b"\n")
            child.stdin.close()
            if talk and ends:
                # A work that ended can be told nothing; why it did, it says below.
                with suppress(OSError), os.fdopen(ends[0][0], "rb") as heard, os.fdopen(ends[1][1], "wb") as told:
                    talk(heard, told)
            for line in iter(partial(child.stdout.readline, LONGEST_LINE), b""):
                kind, said = answer(work, line)
                if kind == "log":
                    log(said)
                elif kind == "started":
                    start_seconds = time.monotonic() - began
                elif kind == "guards":
                    guards = guards or said
                else:
                    ended, confined = said, replace(said["confined"], **(guards or {}))
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        message = errors.read()[-2000:].decode(errors="replace").strip()
    if ended is None:
        raise WorkError(f"{work} died without a word: {message.splitlines()[-1] if message else 'no message'}")
    if "error" in ended:
        raise WorkError(ended["error"], confined.refused)
    return Outcome(ended.get("value"), confined, start_seconds)


def answer(work: str, line: bytes) -> tuple[str, Any]:
    """Read a line that the work's process wrote: "log", "started", "guards" or "ended", and what it says of it. Raises
    WorkError for a line that is none: code there may write what it likes."""
    try:
        reply = json.loads(line)
        for kind in ("log", "started", "guards"):
            if kind in reply:
                return kind, dict(reply[kind]) if kind != "started" else None
        return "ended", {**reply, "confined": Confined(**reply["confined"])}
    except (ValueError, TypeError, KeyError) as error:
        raise WorkError(f"{work} wrote what is no answer ({type(error).__name__}): {line[:60]!r}") from None


def environment(scratch: str) -> dict[str, str]:
    """Make the process's environment: nothing but what is named here."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    # Threads of a product that wait for one without a core sleep, and do not take the core that it needs.
    kept = {"OMP_WAIT_POLICY": "PASSIVE", **kept}
    return {**kept, "LANG": "C.UTF-8", "TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": scratch}


def serve(spec: dict[str, Any]) -> None:
    """Do the work, as the fresh process: one JSON line on standard output for the start, each record logged, and the
    end."""
    os.nice(spec["nice"])
    inside = False
    sources = [*spec["folders"], *spec["path"]]
    if spec["readable"] is not None:
        inside = namespaces.enter(spec["library"], sources, [*spec["named"], *spec["readable"]], os.getcwd())
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the work prints goes to the error text

    def tell(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    confined = Confined()
    if spec["readable"] is not None:
        confined = confine([*spec["readable"], *spec["named"]], sources, spec["library"], os.getcwd(), inside)
    sys.path[:0] = spec["folders"]  # not before the guards are up: a module there may have the name of Python's own
    tell({"guards": {name: getattr(confined, name) for name in ("namespaces", "landlock", "filtered")}})
    try:
        module, _, name = spec["work"].partition(":")
        function = getattr(importlib.import_module(module), name)
        tell({"started": True})
        end = {"value": function(**spec["arguments"], log=lambda record: tell({"log": record}))}
    except Exception as error:
        traceback.print_exc()
        end = {"error": f"{type(error).__name__}: {error}"}
    if spec["readable"] is not None:
        confined.loaded = sorted({*confined.loaded, *loaded()})
    tell({**end, "confined": vars(confined)})


def loaded() -> list[str]:
    """List the files of this process's modules, and of the shared libraries in its memory."""
    files = {str(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        files |= {name for line in maps if ".so" in (name := line[73:]) and name.startswith("/")}
    return sorted(filter(os.path.isabs, files))  # torch.ops and its like name files that are none


def confine(
    readable: Sequence[str], path: Sequence[str], library: Sequence[str], scratch: str, inside: bool
) -> Confined:
    """Put hook, Landlock and filter on this process, for good; `library` are folders of code, `scratch` is the folder
    that it may write to, `inside` says whether it is in namespaces, in which folders of sources have nothing else."""
    roots = sorted({os.path.realpath(folder) for folder in (*library, *KERNEL) if os.path.exists(folder)})
    sources = sorted({os.path.realpath(folder) for folder in path if os.path.isdir(folder)} - {*roots})
    code = sources if inside else [name for folder in sources for name in namespaces.code(folder)]
    closed = landlock([*roots, *code], readable, sources, scratch)
    confined = Confined(landlock=closed, namespaces=inside, filtered=system_calls.install())

    def refuse(what: str) -> None:
        confined.refused.append(what)
        raise PermissionError(f"isolated: {what} is refused")

    def under(name: str, folders: Sequence[str]) -> bool:
        return any(name == folder or name.startswith(folder.rstrip("/") + "/") for folder in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int):
            name = os.path.realpath(os.fsdecode(arguments[0]))
            if under(name, [scratch]):
                return
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and name != os.devnull:
                refuse(f"writing {name}")
            if name in readable:
                confined.opened.append(name)
            elif not under(name, roots) and not (CODE.search(name) and under(name, sources)):
                refuse(f"opening {name}")
            elif os.path.isfile(name) and not name.endswith(".pyc") and not under(name, KERNEL):
                confined.loaded.append(name)
        elif event in WRITES:
            if isinstance(arguments[0], int) or not under(os.path.realpath(os.fsdecode(arguments[0])), [scratch]):
                refuse(f"{event} {arguments[0]}")
        elif event in PROCESSES or event.startswith("socket."):
            refuse(event)

    class Gate:
        """First among the finders of modules, so that it is asked for each that is not there yet."""

        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if any(name == module or name.startswith(module + ".") for module in FORBIDDEN):
                refuse(f"importing {name}")

    sys.meta_path.insert(0, Gate)  # type: ignore[arg-type]
    sys.addaudithook(hook)
    return confined


def landlock(code: Sequence[str], files: Sequence[str], listed: Sequence[str], scratch: str) -> int:
    """Make the kernel refuse this thread, and those it starts, all files but these, writes but to scratch, and TCP.

    code: files and folders; listed: folders whose names may be read. Returns Landlock's version, 0 where there is none.
    System calls 444 to 446 have these numbers on every machine.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return 0
    every, read, look, execute, write = 0x1FFF, 1 << 2, 1 << 3, 1 << 0, 1 << 1
    every |= (version >= 3) << 14  # truncation
    # Files, then TCP, then abstract sockets and signals, as far as this kernel's rules go.
    rules = struct.pack("=QQQ", every, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(444, rules, len(rules), 0)
    grants = [(name, read | look | execute) for name in code] + [(name, read) for name in files]
    grants += [(name, look) for name in listed]
    # Devices, and not what other processes leave in shared memory.
    devices = [f"/dev/{name}" for name in os.listdir("/dev") if name not in ("shm", "mqueue")]
    grants += [(name, read | look | write) for name in devices]
    for name, access in [*grants, (scratch, every)]:
        if os.path.exists(name):
            held = os.open(name, os.O_PATH)
            allowed = access if os.path.isdir(name) else access & ~look
            libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, held), 0)
            os.close(held)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, which the next call asks for
    return version if libc.syscall(446, ruleset, 0) == 0 else 0
