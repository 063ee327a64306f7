"""Notes when the processes of a run do what, without a line in the code that is timed.

Python imports a module of this name in every process that finds it on its path: the driver, Ray's workers, torchrun's
ranks. With HEDGEMIX_MARKS (a folder) in the environment it wraps some functions as their modules are loaded, and each
process writes <pid>.jsonl: name, begin and end (the machine's monotonic clock), cpu (seconds of this process).
"""

import functools
import importlib.machinery
import json
import os
import sys
import time

WRAPPED = {
    "ray": ("init", "shutdown"),
    "pipeline.steps.step": ("perform",),
    "hedgemix.stages": ("train_stage", "score_stage", "quantize_stage", "counts_stage", "evaluate_stage"),
    "hedgemix.train.trainer": ("Run.train_step",),
    "torch.distributed.distributed_c10d": ("init_process_group",),
}
IMPORTS = (
    "torch",
    "ray.train",
    "torch._dynamo",
    "pipeline.execution.train_job",
    "hedgemix.train.trainer",
    "hedgemix.stages",
)


class Marks:
    """Finds the modules above in front of Python's own finder, and changes them once they are loaded."""

    def __init__(self, folder: str) -> None:
        self.file = open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a", buffering=1)  # noqa: SIM115
        self.note("process", time.monotonic(), 0.0, argv=" ".join(sys.orig_argv)[:400])

    def note(self, name: str, began: float, began_cpu: float, **more: object) -> None:
        record = {"name": name, "begin": began, "end": time.monotonic(), "cpu": time.process_time() - began_cpu, **more}
        self.file.write(json.dumps(record) + "\n")

    def find_spec(self, name, path=None, target=None):
        if name not in WRAPPED and name not in IMPORTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                began = time.monotonic(), time.process_time()
                load(module)
                if name in IMPORTS:
                    self.note(f"import {name}", *began)
                for function in WRAPPED.get(name, ()):
                    self.wrap(module, function)

            spec.loader.exec_module = exec_module
        return spec

    def wrap(self, module: object, name: str) -> None:
        *owners, last = name.split(".")
        owner = functools.reduce(getattr, owners, module)
        function = getattr(owner, last)

        @functools.wraps(function)
        def timed(*arguments, **named):
            began = time.monotonic(), time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                kind = getattr(arguments[0], "kind", "") if arguments else ""
                self.note(f"{last} {kind}".rstrip() if last == "perform" else last, *began)

        setattr(owner, last, timed)


if os.environ.get("HEDGEMIX_MARKS"):
    sys.meta_path.insert(0, Marks(os.environ["HEDGEMIX_MARKS"]))
