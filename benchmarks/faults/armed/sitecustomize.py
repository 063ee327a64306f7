"""Run by every Python process that has this folder on its PYTHONPATH (a test's command, Ray's daemons, its workers):
arms the faults in the folder that FAULTS names, and with PRETEND_GPUS lets a CPU do the work of a GPU Ray counts.

Without these variables it does nothing. `injection.py` writes the plan and reads what happened.
"""

import errno
import fnmatch
import json
import os
import signal
import socket
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

HERE = os.path.dirname(os.path.abspath(__file__))


class Plan:
    """The faults of `folder`, counted over all processes by marker files there: `<fault>.<number of the match>`."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "plan.json")) as file:
            self.faults = json.load(file)
        self.rank = None

    def hook(self, event, arguments):
        """Python calls this before it opens or renames a file; what it raises, the caller of `open` gets."""
        if event == "open":
            path, _, flags = arguments
            kind = "write" if flags and flags & (os.O_WRONLY | os.O_RDWR) else "read"
        elif event == "os.rename":  # os.replace too
            path, kind = arguments[1], "rename"
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)):  # a file descriptor
            return
        self.note_rank()
        path = target(os.fsdecode(path))
        met = []
        for fault in self.faults:
            here = fault["event"] == kind and fault["rank"] in (None, self.rank) and now(fault["during"])
            if here and fnmatch.fnmatch(path, fault["path"]):
                met.append((fault, self.count(fault["name"])))
        for fault, number in met:  # after all have counted: firing ends this
            if fault["at"] <= number < fault["at"] + fault["times"]:
                self.fire(fault, path)

    def fire(self, fault, path):
        while not now(fault["after"]):
            time.sleep(0.05)
        if fault["error"]:
            number = getattr(errno, fault["error"])
            raise OSError(number, os.strerror(number), path)
        if fault["machine"]:
            kill_session()
        process = os.getpid()
        if fault["kill_rank"] is not None:
            with open(os.path.join(self.folder, f"rank-{fault['kill_rank']}")) as file:
                process = int(file.read())
        os.kill(process, signal.SIGKILL)

    def count(self, name):
        """The number of this match among those of all processes."""
        number = 1
        while True:
            try:
                made = os.open(os.path.join(self.folder, f"{name}.{number}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.write(made, str(os.getpid()).encode())
                os.close(made)
                return number
            except FileExistsError:
                number += 1

    def note_rank(self):
        """Once this process is a rank of a group, tell the others which process that rank is."""
        group = sys.modules.get("torch.distributed")
        if self.rank is None and group is not None and getattr(group, "is_initialized", bool)():
            self.rank = group.get_rank()
            with open(os.path.join(self.folder, f"rank-{self.rank}"), "w") as file:
                file.write(str(os.getpid()))


def kill_session():
    """SIGKILL to every process of this one's session: a node of cluster.py, or a command with its own Ray."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if os.getsid(int(entry)) == os.getsid(0):
                    os.kill(int(entry), signal.SIGKILL)
            except ProcessLookupError:
                pass
    os.kill(os.getpid(), signal.SIGKILL)


def now(file):
    """Whether the file that a fault waits for is there, if it waits for one."""
    return not file or os.path.exists(file)


def target(path):
    """The file that a temporary one of hedgemix.runtime.files.replacing is to become; other paths as they are."""
    folder, name = os.path.split(path)
    ending = f".{socket.gethostname()}.{os.getpid()}.tmp"
    if name.startswith(".") and name.endswith(ending):
        return os.path.join(folder, name[1 : -len(ending)])
    return path


class Pretended(MetaPathFinder, Loader):
    """Patches the two functions that ask for a GPU, when their modules are imported."""

    def find_spec(self, name, path, target=None):
        if name not in ("hedgemix.stages", "pipeline.execution.tasks", "pipeline.execution.train_job"):
            return None
        sys.meta_path.remove(self)
        try:
            from importlib.util import find_spec

            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        self.loaders = {**getattr(self, "loaders", {}), name: spec.loader}
        spec.loader = self
        return spec

    def create_module(self, spec):
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        self.loaders[module.__name__].exec_module(module)
        if module.__name__ == "hedgemix.stages":
            module.pick_device = lambda recipe: module.torch.device("cpu")
        else:
            module.backend = lambda gpus_per_worker: "gloo"


def chain():
    """Run the sitecustomize that this one hides, if there is one."""
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path or ".") != HERE])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if os.environ.get("FAULTS"):
    sys.addaudithook(Plan(os.environ["FAULTS"]).hook)
if os.environ.get("PRETEND_GPUS"):
    sys.meta_path.insert(0, Pretended())
chain()
