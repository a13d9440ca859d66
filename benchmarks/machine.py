"""What a figure was measured on: stands in every row."""

from __future__ import annotations

import platform
import subprocess

import torch


def describe() -> dict[str, str]:
    """Processor, threads, versions, commit; "+" behind a commit means that the tree had changes."""
    return {
        "cpu": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
    }


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
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
