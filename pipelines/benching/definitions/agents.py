"""Agent attention (arXiv 2312.08874) of a few heads by its definition, on sampled rows: what the check goes by.

Nothing here comes from the library, so that a fault in it cannot hide. The gradient of the output is zero outside the
sampled rows; the gradients of every tensor follow from them exactly, through the agents too, which are means of all
queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from attn_plugins.pipelines.benching.oracle import all_finite, compare, rounding_kernels, sampled_rows
from attn_plugins.pipelines.benching.sides import Run, Verdict

LEAVES = ("q", "k", "v", "agents", "bias_aggregate", "bias_broadcast", "dwc_weight", "dwc_bias")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampledAgents:
    """The last batch item, its first and last head, `count` rows.

    Args:
        leaves: tensors in the order of LEAVES: (B, H, N, D) thrice, (B, H, n, D), and none or all of (1, H, n, N),
            (1, H, N, n), (H * D, 1, 3, 3), (H * D,). A side that is given the agents has a gradient for them; one that
            pools them has none.
        grid: of the last tokens; those before it are class tokens.
        to: agents per axis.
        scales: of both steps.
    """

    leaves: tuple[torch.Tensor, ...]
    grid: tuple[int, int]
    to: tuple[int, int]
    scales: tuple[float, float]
    shortcut: float
    count: int = 128
    _expected: dict[bool, tuple[Tensors, Tensors]] = field(default_factory=dict, repr=False)

    def judge(self, run: Run, gradients: bool) -> Verdict:
        q = self.leaves[0]
        rows = sampled_rows(q.shape[2], self.count).to(q.device)
        heads = torch.tensor(sorted({0, q.shape[1] - 1}), device=q.device)
        parts = {name: self._part(name, t, heads) for name, t in zip(LEAVES, self.leaves, strict=False)}
        generator = torch.Generator(q.device).manual_seed(2)
        shape = (len(heads), len(rows), q.shape[3])
        upstream = torch.randn(shape, generator=generator, device=q.device, dtype=q.dtype)
        if gradients not in self._expected:
            wide = {name: t.double() for name, t in parts.items()}
            exact = self._by_definition(wide, rows, upstream.double(), _by_products, gradients)
            with rounding_kernels(q):
                theirs = self._by_definition(parts, rows, upstream, _fused, gradients)
                if "bias_aggregate" in parts:  # with its gradient, PyTorch may choose products that round less
                    theirs |= self._by_definition(parts, rows, upstream, _fused, gradients, frozen="bias")
            self._expected[gradients] = exact, theirs
        exact, theirs = self._expected[gradients]
        ours = self._ours(run, heads, rows, upstream, gradients)
        errors = {}
        for name, right in exact.items():
            for label, some in _pieces(name, rows, q.shape[2]).items():
                errors[label] = compare(ours[name][:, some], theirs[name][:, some], right[:, some])
        return Verdict(errors)

    def _ours(
        self, run: Run, heads: torch.Tensor, rows: torch.Tensor, upstream: torch.Tensor, gradients: bool
    ) -> Tensors:
        with torch.set_grad_enabled(gradients):
            leaves = [t.detach().requires_grad_(gradients) for t in self.leaves]
            out = run(*leaves)
        found = {"out": all_finite(out.detach())[-1, heads][:, rows]}
        if not gradients:
            return found
        everywhere = torch.zeros_like(out)
        everywhere[-1, heads[:, None], rows[None]] = upstream
        grads = dict(zip(LEAVES, torch.autograd.grad(out, leaves, everywhere, allow_unused=True), strict=False))
        given = grads.pop("agents")
        missing = [name for name, t in grads.items() if t is None]
        if missing:
            raise ValueError(f"no gradient of {', '.join(missing)}")
        found |= {name: self._part(name, all_finite(t), heads) for name, t in grads.items()}
        if given is not None:  # what a side that pools does by itself
            found["q"] = found["q"].double()
            found["q"][:, self._before :] += self._spread(all_finite(given)[-1, heads])
        return found

    def _by_definition(
        self, parts: Tensors, rows: torch.Tensor, upstream: torch.Tensor, attend: Callable[..., torch.Tensor],
        gradients: bool, frozen: str = "-",
    ) -> Tensors:  # fmt: skip
        """Output and gradients of the heads, in the precision that `parts` have."""
        names = [name for name in parts if name != "agents" and not name.startswith(frozen)]
        with torch.set_grad_enabled(gradients):
            at = {name: t.detach().requires_grad_(gradients and name in names) for name, t in parts.items()}
            bias, mask = at.get("bias_aggregate"), at.get("bias_broadcast")
            agents = self._pooled(at["q"][:, self._before :])
            gathered = attend(agents, at["k"], at["v"], bias, self.scales[0])
            out = attend(at["q"][:, rows], agents, gathered, None if mask is None else mask[:, rows], self.scales[1])
            out = out + self.shortcut * at["v"][:, rows]
            if "dwc_weight" in at:
                out = out + self._texture(at["v"], at["dwc_weight"], at["dwc_bias"])[:, rows]
        if not gradients:
            return {"out": out}
        grads = torch.autograd.grad(out, [at[name] for name in names], upstream)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    @property
    def _before(self) -> int:
        return self.leaves[0].shape[2] - self.grid[0] * self.grid[1]

    def _pooled(self, image: torch.Tensor) -> torch.Tensor:
        """(h, H * W, D) to (h, n, D): by products in float64, else as PyTorch does."""
        if image.dtype == torch.float64:
            return torch.einsum("ih,jw,bhwd->bijd", *self._means(image.device), image.unflatten(1, self.grid)).flatten(
                1, 2
            )
        channels = image.transpose(1, 2).unflatten(2, self.grid)
        return F.adaptive_avg_pool2d(channels, self.to).flatten(2).transpose(1, 2)

    def _spread(self, agents: torch.Tensor) -> torch.Tensor:
        """Gradients of the agents to those of the queries: `_pooled` transposed."""
        means = self._means(agents.device)
        return torch.einsum("ih,jw,bijd->bhwd", *means, agents.double().unflatten(1, self.to)).flatten(1, 2)

    def _means(self, device: torch.device) -> list[torch.Tensor]:
        """Per axis (few, many): cell i averages those from floor(i many / few) up to ceil((i + 1) many / few)."""
        found = []
        for many, few in zip(self.grid, self.to, strict=True):
            axis = torch.zeros(few, many, dtype=torch.float64)
            for i in range(few):
                first, last = i * many // few, -(-(i + 1) * many // few)
                axis[i, first:last] = 1 / (last - first)
            found.append(axis.to(device))
        return found

    def _texture(self, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(h, N, D): the 3 x 3 convolution, in float64 a sum of shifted images; class tokens have none."""
        height, width = self.grid
        image = F.pad(v[:, self._before :].unflatten(1, self.grid), (0, 0, 1, 1, 1, 1))
        if v.dtype != torch.float64:
            channels = image.permute(0, 3, 1, 2).flatten(0, 1)[None]
            found = F.conv2d(channels, weight.flatten(0, 1)[:, None], bias.flatten(), groups=channels.shape[1])
            return F.pad(found[0].unflatten(0, bias.shape).flatten(2).transpose(1, 2), (0, 0, self._before, 0))
        total = bias[:, None, None]
        for row in range(3):
            for column in range(3):
                shifted = image[:, row : row + height, column : column + width]
                total = total + weight[:, None, None, :, row, column] * shifted
        return F.pad(total.flatten(1, 2), (0, 0, self._before, 0))

    def _part(self, name: str, t: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """What the sampled heads of the last item have of a tensor: (h, ...)."""
        if name.startswith("dwc"):
            return t.reshape(self.leaves[0].shape[1], -1, *t.shape[2:])[heads]
        return t[-1, heads]


def _pieces(name: str, rows: torch.Tensor, length: int) -> dict[str, slice | torch.Tensor]:
    """Labels and rows of a result: gradients of q and v apart for the sampled rows, where they are far larger."""
    if name not in ("q", "v") or len(rows) == length:
        return {name if name == "out" else f"d{name}": slice(None)}
    others = torch.ones(length, dtype=torch.bool, device=rows.device)
    others[rows] = False
    return {f"d{name}": rows, f"d{name} of other rows": others}


def _by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    scores = scale * q @ k.transpose(-1, -2)
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    mask = None if bias is None else bias[None]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
