"""Ulysses on paper (after arXiv 2309.14509): the bytes that each device sends for a layer, and how long that takes.

A device holds N / P tokens of all heads, and attends to all N tokens of H / P heads. Four exchanges: q, k and v before
the attention, its result behind it; each device keeps a P-th of what it holds and sends the rest:

    bytes = s B D N (2 H + 2 H_kv) (P - 1) / P^2

with s bytes an element. A backward sends as much again: the gradients of all four, the other way round. Of the P - 1
peers 7 stand in the same node. Time is the longer of NVLink's and the network's, at their full rates: a bound, no
measurement. Nothing of it is hidden: attention begins when all keys have come, and its result is sent when it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

NODE = 8  # GPUs


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU: GB/s in each direction over NVLink and over the network, and dense bf16 Tflop/s.

    `attention`: the share of the last that attention reaches; FlashAttention-3 reports 0.75 forward (arXiv 2407.08608).
    """

    name: str
    nvlink: float
    network: float
    peak: float
    attention: float = 0.75


# H100 and H200 SXM differ in memory alone. NVIDIA's data sheets: NVLink 900 GB/s, which is both directions together;
# 989 Tflop/s in bf16 without sparsity. DGX H100/H200 user guide: a ConnectX-7 of 400 Gb/s for each GPU.
HOPPER = Machine("H100 / H200 SXM", nvlink=450.0, network=50.0, peak=989.0)


@dataclass(frozen=True)
class Layer:
    """An attention layer: `density` of its pairs are needed."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    density: float = 1.0
    batch: int = 1
    itemsize: int = 2

    def sent(self, devices: int) -> float:
        """Bytes that a device sends for a forward; an integer where tokens and heads come out even.

        Raises:
            ValueError: heads that so many devices cannot share.
        """
        if self.heads % devices or self.kv_heads % devices:
            raise ValueError(f"{self.heads} heads on {self.kv_heads} cannot be shared by {devices} devices")
        rows = self.itemsize * self.batch * self.head_dim * self.tokens * 2 * (self.heads + self.kv_heads)
        return rows * (devices - 1) / devices**2

    def gflop(self, devices: int) -> float:
        """Of a device, forward: two products over the pairs of its heads."""
        return 4e-9 * self.batch * self.head_dim * self.density * self.tokens**2 * self.heads / devices


@dataclass(frozen=True)
class Estimate:
    """Of one layer's forward on one of the devices: MB sent, milliseconds of both, and the share of the first."""

    devices: int
    megabytes: float
    exchange_ms: float
    attention_ms: float

    @property
    def share(self) -> float:
        """Of the exchange in both together, nothing overlapped."""
        return self.exchange_ms / (self.exchange_ms + self.attention_ms)


def estimate(layer: Layer, devices: int, machine: Machine = HOPPER) -> Estimate:
    """The bound above.

    Raises:
        ValueError: heads that so many devices cannot share.
    """
    sent = layer.sent(devices)
    each = sent / max(devices - 1, 1)
    near = min(devices, NODE) - 1
    seconds = max(near * each / machine.nvlink, (devices - 1 - near) * each / machine.network) / 1e9
    attention = layer.gflop(devices) / (1e3 * machine.peak * machine.attention)
    return Estimate(devices, sent / 1e6, 1e3 * seconds, 1e3 * attention)


SHAPES = {  # a language model's layer with as many KV heads, one with grouped heads, and sparse video attention
    "64 heads": Layer(131072, 64, 64, 128, 0.5),
    "64 heads on 8": Layer(131072, 64, 8, 128, 0.5),
    "64 heads, an eighth of the pairs": Layer(131072, 64, 64, 128, 0.125),
}
DEVICES = (8, 16, 32, 64)


def table() -> Iterator[str]:
    """As Markdown."""
    head = f"{HOPPER.name}, bf16, forward of a layer, 131,072 tokens, D 128"
    yield f"| {head} | GPUs | MB sent | exchange | attention | share |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, layer in SHAPES.items():
        label = f"{name}, density {layer.density:g}"
        for devices in DEVICES:
            try:
                one = estimate(layer, devices)
            except ValueError:
                yield f"| {label} | {devices} | -1 | -1 | -1 | -1 |"
                continue
            yield (
                f"| {label} | {devices} | {one.megabytes:,.0f} | {one.exchange_ms:.2f} ms | {one.attention_ms:.2f} ms "
                f"| {one.share:.0%} |"
            )
