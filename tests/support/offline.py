"""Compile the library's own Triton kernels for an absent GPU: `with offline("sm_90") as kernels: launch(...)`.

Every launch inside the block is compiled for the target, with exactly the specialisation that the launcher's arguments
give it (dtypes, alignment, ones, constants, warps), and is not run: the tensors may be on the CPU, or on "meta". The
target's limit of shared memory holds: a kernel above it raises Triton's `OutOfResources`, as on the GPU.
Kernels must not be interpreted: run it in a process without TRITON_INTERPRET (`environment()`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

# Target -> (backend, architecture, threads of a warp, bytes of shared memory that one block may have).
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_89": ("cuda", 89, 32, 101_376),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "sm_120": ("cuda", 120, 32, 101_376),
    "gfx942": ("hip", "gfx942", 64, 65_536),
    "gfx950": ("hip", "gfx950", 64, 163_840),
}


def environment() -> dict[str, str]:
    """The environment for a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


class _Utils:
    """What Triton asks of a driver's C part."""

    def __init__(self, shared: int, warp: int) -> None:
        self.properties = {
            "max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": warp
        }  # fmt: skip

    def get_device_properties(self, device: object) -> dict[str, int]:
        return self.properties

    def load_binary(self, *_: object) -> tuple[str, str, int, int, int]:
        return (
            "module",
            "function",
            0,
            0,
            1024,
        )  # registers and spills are read from the binary: tests/support/resources

    def unload_module(self, module: object) -> None:
        pass


class _Driver:
    """A driver with one device that takes every launch and does nothing."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        backend, arch, warp, shared = TARGETS[name]
        self.name, self.target, self.utils = name, GPUTarget(backend, arch, warp), _Utils(shared, warp)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"offline {self.name}"  # a name of its own: Triton keeps compiled kernels and limits by device

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *_: None


@contextlib.contextmanager
def offline(target: str) -> Iterator[list[Any]]:
    """Yields the list of Triton's `CompiledKernel`s, one for each different launch, in order.

    Raises:
        KeyError: a target that is not in `TARGETS`.
        RuntimeError: kernels are interpreted in this process.
    """
    import triton
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled here; use a process with environment()")
    kernels: list[Any] = []
    before, prepare = driver._active, CompiledKernel._init_handles

    def recording(self: Any) -> Any:
        if self.module is None:
            kernels.append(self)
        return prepare(self)

    driver.set_active(_Driver(target))
    CompiledKernel._init_handles = recording
    try:
        yield kernels
    finally:
        driver._active, CompiledKernel._init_handles = before, prepare
        for kernel in kernels:  # so that a later block records a kernel that Triton still holds
            kernel.module = kernel._run = None
