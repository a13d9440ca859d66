"""Problems for agent attention, and the authors' modules in plain products, written from the paper's formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.ops import agent_attention

NAMES = ("out", "q", "k", "v", "agents", "bias_aggregate", "bias_broadcast", "dwc_weight", "dwc_bias")


@dataclass(frozen=True)
class Problem:
    """Tensors by argument name, and the other options."""

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, tensors={name: t.to(dtype) for name, t in self.tensors.items()})

    def call(self, **more: Any) -> torch.Tensor:
        return agent_attention(**self.tensors, **{**self.options, **more})

    def pytorchs(self) -> dict[str, torch.Tensor]:
        """What PyTorch gives: by its fused kernel, where it can, and a bias's gradient by its products."""
        return self.results(pytorchs) | self.results(pytorchs, frozen="bias")

    def results(self, attend: Any = agent_attention, frozen: str = "-", **more: Any) -> dict[str, torch.Tensor]:
        """The output, and gradients of all tensors (but those `frozen`, by their beginning) for one fixed upstream."""
        tensors = {
            name: t.detach().clone().requires_grad_(not name.startswith(frozen)) for name, t in self.tensors.items()
        }
        out = attend(**tensors, **{**self.options, **more})
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.dtype)
        wanted = [name for name in tensors if not name.startswith(frozen)]
        grads = torch.autograd.grad(out, [tensors[name] for name in wanted], upstream)
        return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def random_problem(seed: int, head_dim: int = 8, longest: int = 40, generic: bool = False) -> Problem:
    """float64; sizes, strides, KV heads, biases and options by the seed, so that every kind comes up in a few seeds.

    `generic`: no gradient is 0, as where there is one agent, or a bias that is constant over its softmax.
    """
    rng = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=rng))]

    def size(most: int) -> int:
        return 1 + int(torch.randint(most, (1,), generator=rng))

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def heads_inside(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    batch, kv_heads, group = pick(1, 2), pick(1, 3), pick(1, 1, 2)
    heads, agents = kv_heads * group, int(generic) + pick(1, size(5), size(12))
    grid = pick((size(6), size(7)), (size(longest),), (size(3), size(3), size(4)))
    exact = pick((0, 0), (0, 0), (size(3), 0), (0, size(4)), (2, 1))
    prefix = int(generic) + pick(0, 0, 1, 2)
    queries = sum(exact) + prefix + torch.Size(grid).numel()
    same = pick(True, True, False)
    keys = queries if same else generic + size(longest)
    tensors = {
        "q": make(batch, heads, queries, head_dim), "k": make(batch, kv_heads, keys, head_dim),
        "v": make(batch, kv_heads, keys, head_dim), "agents": make(batch, heads, agents, head_dim),
    }  # fmt: skip
    if pick(True, False):
        tensors = {name: heads_inside(t) for name, t in tensors.items()}
    for name, shape in (
        ("bias_aggregate", (batch, heads, agents, keys)),
        ("bias_broadcast", (batch, heads, queries, agents)),
    ):
        if pick(True, False):
            tensors[name] = make(
                *(pick(1, have, have) for have in shape[:3]), shape[3] if generic else pick(1, shape[3])
            )
    options: dict[str, Any] = {"exact_before": exact[0], "exact_after": exact[1]}
    if pick(True, False):
        options |= {
            "scale_aggregate": 0.3 if generic else pick(0.0, 0.3),
            "scale_broadcast": pick(-0.2, head_dim**-0.15),
        }
    if same and pick(True, False):
        options["shortcut"] = 0.075
    if same and pick(True, False):
        options["grid"] = grid
        tensors["dwc_weight"] = make(heads * head_dim, 1, *(pick(1, 3) for _ in grid))
        if pick(True, False):
            tensors["dwc_bias"] = make(heads * head_dim)
    return Problem(tensors, options)


def pytorchs(
    q, k, v, agents, *, scale_aggregate=None, scale_broadcast=None, bias_aggregate=None, bias_broadcast=None,
    shortcut=0.0, dwc_weight=None, dwc_bias=None, grid=None, exact_before=0, exact_after=0,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """The same by PyTorch's own operators, in the precision of its inputs: what the tolerance rule measures against."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    stop = q.shape[2] - exact_after
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=bias_aggregate, scale=scale_aggregate)
    out = F.scaled_dot_product_attention(q, agents, gathered, attn_mask=bias_broadcast, scale=scale_broadcast)
    exact = F.scaled_dot_product_attention(q, k, v, scale=scale_aggregate)
    if shortcut:
        out = out + shortcut * v
    if dwc_weight is not None:
        cells = torch.Size(grid).numel()
        image = v[:, :, stop - cells : stop].transpose(-1, -2).reshape(q.shape[0], -1, *grid)
        padding = [s // 2 for s in dwc_weight.shape[2:]]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
        texture = convolve(image, dwc_weight, dwc_bias, padding=padding, groups=len(dwc_weight))
        texture = texture.reshape(*v.shape[:2], -1, cells).transpose(-1, -2)
        out = torch.cat([out[:, :, : stop - cells], out[:, :, stop - cells : stop] + texture, out[:, :, stop:]], dim=2)
    return torch.cat([exact[:, :, :exact_before], out[:, :, exact_before:stop], exact[:, :, stop:]], dim=2)


def upsampled(bias: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The authors' block bias (h, n, 7, 7) over a grid, (1, h, n, H * W)."""
    return F.interpolate(bias, size=grid, mode="bilinear", align_corners=False).flatten(-2)[None]
