"""Launches the merge kernels. Grids come from shapes alone: nothing is read back from the device."""

from __future__ import annotations

import math

import torch
import triton

from attn_plugins.ops.target import OPTIONS, on_device, triton_target
from attn_plugins.ops.weighted_merge.triton import configs
from attn_plugins.ops.weighted_merge.triton.kernels import (
    choose_references,
    combine_spread,
    merge_references,
    phrase_relevance,
    phrase_spread,
)

LOG2E = math.log2(math.e)
CHOICES = 256  # positions of a program that chooses


def weights(
    q: torch.Tensor,
    phrase_k: torch.Tensor,
    phrase_lengths: torch.Tensor,
    masks: torch.Tensor | None,
    scale: float,
    temperature: float,
    null_bias: float | None,
) -> torch.Tensor:
    """w (B, R, S) in float32, by four launches."""
    batch, heads, positions, dim = q.shape
    references, rows = phrase_k.shape[1], phrase_k.shape[3]
    out = torch.empty(batch, references, positions, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    keys = phrase_k.expand(batch, -1, -1, -1, -1)
    lengths = phrase_lengths.expand(batch, -1)
    masks = None if masks is None else masks.expand(batch, -1, -1)
    width = max(16, triton.next_power_of_2(dim))
    config = configs.config_for(triton_target() or "", q.element_size(), width)
    tile = configs.rows_for(rows, config)
    share = max(configs.SHARE, config.positions)
    splits = triton.cdiv(positions, share)
    tops = torch.empty(batch, references, heads, rows, splits, dtype=torch.float32, device=q.device)
    sums, relevance = torch.empty_like(tops), torch.empty_like(out)
    best, log_mean = (torch.empty(tops.shape[:-1], dtype=torch.float32, device=q.device) for _ in range(2))
    shapes = {
        "POSITIONS": config.positions, "ROWS": tile, "D": dim, "WIDTH": width, "PRECISION": "ieee",
        "num_warps": config.warps, "num_stages": config.stages, **OPTIONS,
    }  # fmt: skip
    with on_device(q):
        phrase_spread[(batch * references * heads, splits, triton.cdiv(rows, tile))](
            q, keys, tops, sums, scale * LOG2E, *q.stride(), *keys.stride(), heads, references, positions, rows, share,
            splits, **shapes,
        )  # fmt: skip
        combine_spread[(tops[..., 0].numel(),)](
            tops, sums, best, log_mean, positions, splits, SPLITS=triton.next_power_of_2(splits), num_warps=1, **OPTIONS
        )
        phrase_relevance[(batch * references, triton.cdiv(positions, config.positions))](
            q, keys, lengths, best, log_mean, relevance, scale * LOG2E, *q.stride(), *keys.stride(), *lengths.stride(),
            heads, references, positions, rows, **shapes,
        )  # fmt: skip
        choose_references[(batch, triton.cdiv(positions, CHOICES))](
            relevance, masks, out, 1 / temperature, 0.0 if null_bias is None else null_bias * LOG2E / temperature,
            *((0, 0, 0) if masks is None else masks.stride()), references, positions, HAS_MASKS=masks is not None,
            HAS_NULL=null_bias is not None, POSITIONS=CHOICES, num_warps=2, **OPTIONS,
        )  # fmt: skip
    return out


def forward(
    q: torch.Tensor,
    text_out: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    strengths: torch.Tensor,
    image_lengths: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """text_out + sum_i strengths_i Z_i, in q's memory layout."""
    batch, heads, positions, dim = q.shape
    references, tokens = image_k.shape[1], image_k.shape[3]
    out = torch.empty_like(q)
    if not out.numel():
        return out
    width = max(16, triton.next_power_of_2(dim))
    config = configs.config_for(triton_target() or "", q.element_size(), width)
    lengths = None if image_lengths is None else image_lengths.expand(batch, -1)
    lengths_strides = (0, 0) if lengths is None else lengths.stride()
    with on_device(q):
        merge_references[(triton.cdiv(positions, config.positions), batch * heads)](
            q, text_out, image_k, image_v, strengths.contiguous(), lengths, out, scale * LOG2E, *q.stride(),
            *text_out.stride(), *image_k.stride(), *image_v.stride(), *lengths_strides, *out.stride(), heads,
            references, positions, tokens, HAS_LENGTHS=lengths is not None,
            POSITIONS=config.positions, ROWS=configs.rows_for(tokens, config), D=dim, WIDTH=width, PRECISION="ieee",
            num_warps=config.warps, num_stages=config.stages, **OPTIONS,
        )  # fmt: skip
    return out
