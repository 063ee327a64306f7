"""What a row says of an error: the line with the cause, whatever stands around it."""

from __future__ import annotations

import pytest

from pipeline.execution.failures import explain

HINT = """

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially if you're reporting a bug to PyTorch).
"""


class BackendCompilerFailed(RuntimeError):
    pass


class InductorError(RuntimeError):
    pass


MESSAGES = {
    "one line": (ValueError("seed 1 is odd"), "ValueError: seed 1 is odd"),
    "several lines": (RuntimeError("\n\nfirst\nsecond"), "first"),
    "its own name": (ValueError("ValueError: twice"), "ValueError: twice"),
    "no message": (ValueError(), "ValueError: no message"),
    "torch's compiler": (
        BackendCompilerFailed(
            "backend='inductor' raised:\nImportError: cannot import name 'median' from 'statistics' (x.py)" + HINT
        ),
        "BackendCompilerFailed: backend='inductor' raised: ImportError: cannot import name 'median' from 'statistics' "
        "(x.py)",
    ),
    "no compiler": (
        InductorError("InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')" + HINT),
        "InductorError: InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')",
    ),
    "a C++ compiler": (
        InductorError(
            "CppCompileError: C++ compile error\n\nCommand:\ng++ /tmp/header.hpp -O3 -o /tmp/header.i\n\nOutput:\n"
            "\x1b[1mheader.hpp:3:10:\x1b[0m fatal error: Python.h: No such file or directory\n" + HINT
        ),
        "InductorError: CppCompileError: C++ compile error: header.hpp:3:10: fatal error: Python.h: No such file or "
        "directory",
    ),
    "a worker that could not begin": (
        RuntimeError(
            "Training failed due to controller error:\nray::RayTrainWorker.run_train_fn() (pid=1, ip=127.0.0.1)\n"
            '  File "worker.py", line 146, in run_train_fn\nray.exceptions.RaySystemError: System error: x.so: failed\n'
            "traceback: Traceback (most recent call last):\n    import torch\nImportError: x.so: failed to map"
        ),
        "Training failed due to controller error: ImportError: x.so: failed to map",
    ),
    "frames without an end": (RuntimeError("ray::f() (pid=1)\n  File x"), "ray::f() (pid=1)"),
    "NCCL": (
        RuntimeError(
            "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.28.9\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 640 bytes"
        ),
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.28.9: Last error: Failed to "
        "CUDA calloc async 640 bytes",
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_row_quotes_the_line_that_has_the_cause(kind: str) -> None:
    error, line = MESSAGES[kind]
    assert explain(error) == line
