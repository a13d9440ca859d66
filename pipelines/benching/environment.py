"""What a GPU figure was measured on: stands in every row."""

from __future__ import annotations

import importlib.metadata
import platform
import re

import torch

from attn_plugins.pipelines.benching import clocks, machine


def describe(device: torch.device) -> dict[str, str]:
    """GPU, driver, CUDA, versions, commit; "-1" for what is not known."""
    return {
        "gpu": gpu_name(device),
        "driver": clocks.driver() if device.type == "cuda" else "-1",
        "cuda": str(torch.version.cuda or torch.version.hip or "-1"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "natten": version("natten"),
        "python": platform.python_version(),
        "commit": machine.commit() or "-1",
    }


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none (dry run)"


def slug(name: str) -> str:
    """For a file name: "NVIDIA H200" is "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-1"
