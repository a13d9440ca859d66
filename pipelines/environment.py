"""What this machine offers, as a report to paste into an issue: what is there, and what stands in for what is not.

Imports nothing heavy but torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

# what is looked for, and what happens without it ("": it is required)
PACKAGES = {
    "torch": "",
    "numpy": "",
    "triton": "the operators run on their cpu backend: PyTorch, without kernels of our own",
    "diffusers": "no family of diffusers: models of transformers alone can be patched",
    "transformers": "no family of transformers: models of diffusers alone can be patched",
    "accelerate": "no device_map and no offload; the training examples do not run",
    "peft": "no LoRA",
    "safetensors": "weights of methods cannot be saved or loaded",
    "scipy": "no search under a budget (tune, moa-search)",
    "scikit-learn": "no handwritten digits to train on",
    "matplotlib": "no plots; tables and CSV files are written",
    "natten": "ops.neighborhood_attention; DiNAT runs with attn_plugins.patches.natten",
    "flash-attn": "dense attention is PyTorch's SDPA, or what you choose in the library",
    "sageattention": "dense attention is PyTorch's SDPA, or what you choose in the library",
    "xformers": "dense attention is PyTorch's SDPA, or what you choose in the library",
    "bitsandbytes": "no linears quantised by it",
    "torchao": "no linears quantised by it",
}
# what decides which instructions PyTorch's CPU kernels use, as /proc/cpuinfo calls it
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "sve2", "bf16")


@dataclass(frozen=True)
class Fact:
    """A row of the report. `note`: what a reader should know of the value, or what is used instead; or nothing."""

    name: str
    value: str
    note: str = ""


def package_version(name: str) -> str:
    """The installed version of a distribution, or "-"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def untested(library: str) -> str | None:
    """Why `library` ("diffusers" or "transformers") is outside of what the families were tested with, or None."""
    from attn_plugins.patches.versions import warn_if_untested

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_if_untested.__wrapped__(library)  # past its cache: it warns once in a process
    return str(said[0].message).removeprefix("attn_plugins: ") if said else None


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


def instructions() -> list[str]:
    """The vector instructions that the CPU has, where the system tells (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = (line.partition(":")[2].split() for line in text.splitlines() if line.lower().startswith(("flags", "feat")))
    has = set(next(lines, []))
    return [flag for flag in _FLAGS if flag in has]


def facts() -> list[Fact]:
    """Everything that an issue should say, in the order to print it."""
    import torch

    import attn_plugins

    names, cards = backends(), devices()
    threads = f"{torch.get_num_threads()} (between operations: {torch.get_num_interop_threads()})"
    limits = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    return [
        Fact("attn-plugins", attn_plugins.__version__),
        Fact("python", platform.python_version()),
        Fact("system", f"{platform.system()} {platform.release()}"),
        Fact("machine", machine, ", ".join(instructions())),
        Fact("torch threads", threads, ", ".join(limits)),
        Fact("cuda / rocm", f"{torch.version.cuda or '-'} / {torch.version.hip or '-'}"),
        Fact("devices", "; ".join(cards) or "cpu only"),
        Fact("backends", ", ".join(names), _about_backends(names)),
        *(_package(name, instead) for name, instead in PACKAGES.items()),
    ]


def environment() -> dict[str, str]:
    """Name and value of every fact, in order: what results of measurements keep beside them."""
    return {fact.name: fact.value for fact in facts()}


def _about_backends(names: list[str]) -> str:
    if "triton" in names:
        return 'backend="auto" takes triton for tensors on the GPU, cpu for others'
    lacking = "a GPU" if importlib.util.find_spec("triton") is not None else "triton"
    return f'triton needs {lacking}: backend="auto" takes cpu'


def _package(name: str, instead: str) -> Fact:
    version = package_version(name)
    if version == "-":
        return Fact(name, version, f"not installed: {instead}" if instead else "not installed, and required")
    return Fact(name, version, f"outside of what was tested: {reason}" if (reason := untested(name)) else "")
