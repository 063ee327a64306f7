"""A copy of the project, as a user's checkout is: with files that stay at home, and with traps for who imports."""

from __future__ import annotations

import shutil
from pathlib import Path

from support import tiny_record

HOME = ("data/train.bin", "runs/tiny.parquet", ".venv/bin/python", ".ray-token/auth_token", "bench/numbers.json")
"""What a package must not hold: large, or secret."""
DECOYS = ("statistics", "torch", "numpy")
OF_FEW_PARTS = """
--seeds 1 --record tiny --train.compile --train.steps 3 --model.layers 1 --model.bigram-buckets 0
--model.value-embedding-layers 0 --model.no-smear-gate --model.no-skips --model.no-xsa --model.no-input-mix
--model.no-residual-scale --data.max-valid-tokens 1100
"""
COMPILED = OF_FEW_PARTS.split()
"""What the compiler's processes import is the same for a model of few parts, which they have less to do with."""


def make(folder: Path) -> Path:
    """Copy it outside git, with what stays at home beside it; and beside its script, modules with names of libraries,
    of which no process of a record must meet one."""
    folder.mkdir()
    for name in ("hedgemix", "pipeline"):
        shutil.copytree(tiny_record.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(tiny_record.ROOT / name, folder)
    for name in HOME:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays at home")
    for name in DECOYS:
        (folder / "pipeline" / f"{name}.py").write_text("raise ImportError(__file__)\n")
    return folder
