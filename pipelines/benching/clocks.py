"""The GPU's clocks, power and temperature: a time without them cannot be compared with another. Read, never set."""

from __future__ import annotations

import subprocess
from dataclasses import astuple, dataclass

import torch


@dataclass(frozen=True)
class Clocks:
    """MHz, MHz, watts, degrees Celsius; -1 where it is not known."""

    sm_mhz: float = -1.0
    memory_mhz: float = -1.0
    power_w: float = -1.0
    temperature_c: float = -1.0


FIELDS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


def read(device: torch.device) -> Clocks:
    """By NVML if it is there (milliseconds), else by nvidia-smi (a good part of a second), else -1 throughout."""
    if device.type != "cuda":
        return Clocks()
    try:
        return _by_nvml(device)
    except Exception:  # no pynvml, no driver library, a GPU that NVML does not show: all mean "ask nvidia-smi"
        return _by_nvidia_smi(device)


def both(before: Clocks, after: Clocks) -> dict[str, float]:
    """As columns of a row."""
    names = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
    rows = (("before", before), ("after", after))
    return {f"{n}_{when}": value for when, c in rows for n, value in zip(names, astuple(c), strict=True)}


def driver() -> str:
    """The driver's version, "-1" where it is not known."""
    return _smi("driver_version", "") or "-1"


def _uuid(device: torch.device) -> str:
    """As NVML and nvidia-smi number GPUs; CUDA's own numbers are another order. "" where torch does not say."""
    found = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return found if not found or found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


def _by_nvml(device: torch.device) -> Clocks:
    import pynvml  # type: ignore[import-not-found]

    pynvml.nvmlInit()
    uuid = _uuid(device)
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
    return Clocks(
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def _by_nvidia_smi(device: torch.device) -> Clocks:
    return parse(_smi(FIELDS, _uuid(device)))


def parse(line: str) -> Clocks:
    """A line of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`."""
    values = []
    for text in line.split(",") if line else []:
        try:
            values.append(float(text))
        except ValueError:  # "[N/A]"
            values.append(-1.0)
    return Clocks(*values) if len(values) == 4 else Clocks()


def _smi(fields: str, uuid: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *(["-i", uuid] if uuid else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.stdout.strip() else ""
