"""What this machine offers, as a report to paste into an issue. Imports nothing heavy but torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy",
    "natten", "flash-attn", "sageattention", "xformers",
)  # fmt: skip


def package_version(name: str) -> str:
    """The installed version of a distribution, or "-"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def devices() -> list[str]:
    """The accelerators that torch sees, one line each, with memory in GiB; an empty list on a machine without one."""
    import torch

    rows = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        kind = "rocm" if torch.version.hip else f"sm_{card.major}{card.minor}"
        rows.append(f"cuda:{index} {card.name}, {kind}, {card.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        rows.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        rows += [f"xpu:{index} {torch.xpu.get_device_name(index)}" for index in range(torch.xpu.device_count())]
    return rows


def backends() -> list[str]:
    """The operators' backends that can run here; the last one is what "auto" takes for tensors on the accelerator."""
    import torch

    names = ["reference", "cpu"]
    if importlib.util.find_spec("triton") is not None and torch.cuda.is_available():
        names.append("triton")
    return names


def environment() -> dict[str, str]:
    """Name and value of everything that an issue should say, in the order to print it."""
    import torch

    import attn_plugins

    rows = {"attn-plugins": attn_plugins.__version__}
    rows |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    rows["machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    rows["torch threads"] = f"{torch.get_num_threads()} (between operations: {torch.get_num_interop_threads()})"
    rows["cuda / rocm"] = f"{torch.version.cuda or '-'} / {torch.version.hip or '-'}"
    rows["devices"] = "; ".join(devices()) or "cpu only"
    rows["backends"] = ", ".join(backends())
    rows |= {name: package_version(name) for name in PACKAGES}
    return rows
