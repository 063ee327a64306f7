"""What made a result: the versions and the tree of the code that runs here."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import ray
import torch

from hedgemix import __version__
from hedgemix.standalone import script


@cache
def origin() -> dict[str, Any]:
    """Tell the versions and the git state of what runs here; git is empty outside a checkout (a job's working
    directory)."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, encoding="utf-8", check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    dirty = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "hedgemix_version": __version__,
        "code_sha256": script.sha256(),
        "torch_version": torch.__version__,
        "ray_version": ray.__version__,
        "python_version": platform.python_version(),
        "git_commit": commit,
        "git_dirty": None if dirty is None else bool(dirty),
    }
