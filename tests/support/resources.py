"""What a compiled Triton kernel takes, read from its binary: registers, spills, shared memory, tensor cores.

NVIDIA: `cuobjdump` from the Triton wheel. AMD: the notes at the end of the assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TENSOR_CORE = {
    "cuda": re.compile(r"\b(?:HMMA|HGMMA|QGMMA|DMMA|UTC[A-Z]*MMA)\b"),  # sm_80 to sm_89 and sm_120, sm_90, sm_100
    "hip": re.compile(r"\bv_s?mfma[a-z]*_\w+"),
}
SPILL = re.compile(r"\b(?:STL|LDL)\b")


@dataclass(frozen=True)
class Resources:
    """`registers` of a thread (on AMD vector registers, accumulators included); `spills`: instructions that move a
    register to local memory or back (on AMD: vector registers that were spilled); `shared` bytes of a block;
    `tensor_core`: instructions in the binary that run on tensor or matrix cores.
    """

    registers: int
    spills: int
    shared: int
    tensor_core: int


def resources(kernel: Any) -> Resources:
    """Of a `CompiledKernel`, as `offline` yields them."""
    return _nvidia(kernel) if kernel.metadata.target.backend == "cuda" else _amd(kernel)


def _nvidia(kernel: Any) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return Resources(
        registers=int(re.findall(r"\bREG:(\d+)", usage)[0]),
        spills=len(SPILL.findall(code)),
        shared=kernel.metadata.shared,
        tensor_core=len(TENSOR_CORE["cuda"].findall(code)),
    )


def _amd(kernel: Any) -> Resources:
    code = kernel.asm["amdgcn"]
    notes = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", code, re.MULTILINE)}
    return Resources(
        registers=notes["vgpr_count"],
        spills=notes["vgpr_spill_count"],
        shared=kernel.metadata.shared,
        tensor_core=len(TENSOR_CORE["hip"].findall(code)),
    )
