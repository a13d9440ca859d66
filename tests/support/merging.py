"""Random problems of `weighted_merge`, and its formula as the paper writes it: one object after another."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.ops import weighted_merge

DIFFERENTIABLE = ("q", "text_out", "image_k", "image_v", "text_weight")


@dataclass
class Problem:
    """Arguments of `weighted_merge`. Rows that no one may read are NaN."""

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Problem:
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()}
        return replace(self, tensors=cast)

    def run(self, merge: Any = weighted_merge, **more: Any) -> Any:
        return merge(**self.tensors, **{**self.options, **more})

    def results(self, merge: Any = weighted_merge, **more: Any) -> dict[str, torch.Tensor]:
        """The output, and its gradients for a random direction."""
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.tensors.items() if n in DIFFERENTIABLE}
        out = merge(**{**self.tensors, **leaves}, **{**self.options, **more})
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), up)
        return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def paper(
    q, text_out, phrase_k, phrase_lengths, image_k, image_v, *, image_lengths=None, scales=1.0, text_weight=None,
    temperature=1.0, masks=None, null_bias=None, scale=None, phrase_q=None, return_weights=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Plain ratios of means of softmaxes: right in float64 while nothing underflows."""
    batch, heads, positions, dim = q.shape
    count = image_k.shape[1]
    factor = dim**-0.5 if scale is None else scale
    strengths = list(scales) if not isinstance(scales, float) else [scales] * count
    out, all_weights = [], []
    for b in range(batch):
        relevances, attended = [], []
        for i in range(count):
            n = int(phrase_lengths[b % len(phrase_lengths), i])
            rows = phrase_k[b % len(phrase_k), i, :, :n].detach()
            asked = (q if phrase_q is None else phrase_q)[b].detach()
            p = torch.softmax(factor * rows @ asked.transpose(-1, -2), dim=-1)  # (H, n, S)
            r = p.mean((0, 1)) if n else p.new_zeros(positions)
            r = r ** (1 / temperature) if temperature != math.inf else (r > 0).to(r.dtype)
            m = 1.0 if masks is None else masks[b % len(masks), i].clamp(0, 1)
            relevances.append(r * m)
            t = image_k.shape[3] if image_lengths is None else int(image_lengths[b % len(image_lengths), i])
            keys, values = image_k[b, i, :, :t], image_v[b, i, :, :t]
            attended.append(scaled_dot_product_attention(q[b], keys, values, scale=factor) if t else 0.0)
        total = sum(relevances)
        if null_bias is not None:
            total = total + (math.exp(null_bias) / positions) ** (1 / temperature)
        weights = [torch.where(total > 0, r / total, 0.0) for r in relevances]
        if masks is not None:
            cover = masks[b % len(masks)].clamp(0, 1).sum(0).clamp(max=1)
            weights = [w * cover for w in weights]
        gate = 1.0
        if text_weight is not None:
            flat = text_out[b].transpose(0, 1).reshape(positions, heads * dim)
            open_ = torch.sigmoid(flat @ text_weight)
            gate = open_ / open_.mean()
        merged = text_out[b]
        for w, z, strength in zip(weights, attended, strengths, strict=True):
            merged = merged + ((gate * w * strength)[None, :, None] * z).to(q.dtype)
        out.append(merged)
        all_weights.append(torch.stack(weights))
    return (torch.stack(out), torch.stack(all_weights)) if return_weights else torch.stack(out)


def random_problem(seed: int, *, references: int | None = None, tokens: int | None = None, plain: bool = False,
                   head_dim: int | None = None, positions: int | None = None) -> Problem:  # fmt: skip
    """In float64. `plain`: the paper's layer, with text_weight, and no option that the paper has not."""
    dice = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    batch, heads = dice.randint(1, 3), dice.randint(1, 3)
    dim = head_dim or dice.choice([8, 16, 40])
    places = positions or dice.randint(1, 50)
    count, most = references or dice.randint(1, 4), tokens or dice.choice([1, 4, 5, 16])
    rows = dice.randint(1, 5)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    items = dice.choice([1, batch])
    lengths = torch.randint(1, rows + 1, (items, count), generator=rng)
    if not plain and count > 1 and dice.random() < 0.2:
        lengths[:, 0] = 0
    phrase_k = made(items, count, heads, rows, dim)
    phrase_k[(torch.arange(rows) >= lengths[..., None])[:, :, None].expand(-1, -1, heads, -1)] = float("nan")
    image_k, image_v = (made(batch, count, most, heads, dim).transpose(2, 3) for _ in range(2))
    tensors = {
        "q": made(batch, places, heads, dim).transpose(1, 2),
        "text_out": made(batch, places, heads, dim).transpose(1, 2),
        "phrase_k": phrase_k, "phrase_lengths": lengths.to(dice.choice([torch.int32, torch.int64])),
        "image_k": image_k, "image_v": image_v,
    }  # fmt: skip
    options: dict[str, Any] = {}
    if plain or dice.random() < 0.5:
        tensors["text_weight"] = made(heads * dim)
    if not plain:
        if dice.random() < 0.4:
            short = torch.randint(1, most + 1, (dice.choice([1, batch]), count), generator=rng)
            hidden = (torch.arange(most) >= short[..., None])[:, :, None].expand(batch, -1, heads, -1)
            image_k[hidden] = image_v[hidden] = float("nan")
            tensors["image_lengths"] = short
        options["scales"] = dice.choice([1.0, 0.6, [0.3 + 0.2 * i for i in range(count)]])
        options["temperature"] = dice.choice([1.0, 1.0, 0.5, 3.0, math.inf])
        if dice.random() < 0.4:
            tensors["masks"] = made(dice.choice([1, batch]), count, places) * 0.7 + 0.4
        options["null_bias"] = dice.choice([None, None, 0.0, -1.5])
        options["scale"] = dice.choice([None, None, 0.3])
        if seed % 4 == 1:
            tensors["phrase_q"] = made(batch, heads, places, dim)
    return Problem(tensors, options)
