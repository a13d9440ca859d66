"""What a figure was measured on: stands in every row."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """Processor, threads, versions, commit; "+" behind a commit means that the tree had changes."""
    return {
        "cpu": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """Of this code: git's, or ATTN_PLUGINS_COMMIT where it travelled without its history; "" where neither is there."""
    if given := os.environ.get("ATTN_PLUGINS_COMMIT"):
        return given
    if not _git("ls-files", "../__init__.py"):  # an installed copy, perhaps inside somebody else's repository
        return ""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    caps = torch.backends.cpu.get_cpu_capability()
    amx = ", AMX" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else ""
    return f"{name} ({caps}{amx})"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
