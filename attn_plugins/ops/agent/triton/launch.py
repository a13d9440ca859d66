"""The Triton backend of `agent_attention`: what each kernel is called with. Nothing here waits for the device."""

from __future__ import annotations

import math

import torch
import triton

from attn_plugins.ops.agent.steps import Gradients
from attn_plugins.ops.agent.triton import configs
from attn_plugins.ops.agent.triton.backward import grad_bias_kernel, grad_keys_kernel, grad_rows_kernel
from attn_plugins.ops.agent.triton.forward import attend_kernel
from attn_plugins.ops.agent.triton.strides import in_rows, room, share_strides, spread, strides, unit_of
from attn_plugins.ops.block_sparse.triton.configs import Config
from attn_plugins.ops.block_sparse.triton.launch import tile_constants, tile_width
from attn_plugins.ops.decode.triton.kernels import combine_shares
from attn_plugins.ops.decode.triton.launch import SHARES
from attn_plugins.ops.target import OPTIONS, on_device, triton_target


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    values: torch.Tensor | None = None,
    shortcut: float = 0.0,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `steps.Backend` says. The keys are split where there are too few blocks of rows to fill the device."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    out = torch.empty_like(q) if into is None else into
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    config = _config_of("attend", q, queries, keys)
    programs = triton.cdiv(queries, config.block_m) * batch * heads
    splits = 1 if values is not None else configs.split_count(programs, keys, config.block_n)
    partial, partial_lse = out[..., None, :], lse
    if splits > 1:
        partial = _shares(q, splits)
        partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device)
    bias = in_rows(bias)
    unit = unit_of(q, k, v, values, partial)
    with on_device(q):
        attend_kernel[programs, splits](
            q, k, v, bias, values, partial, partial_lse,
            *strides(unit, q, k, v), *spread(bias), *strides(unit, values), *share_strides(unit, partial),
            heads, heads // k.shape[1], _group(values, heads), queries, keys, splits, scale, shortcut,
            **tile_constants(head_dim, config), SPLIT=splits > 1, UNIT=unit,
        )  # fmt: skip
        if splits > 1:
            combine_shares[batch * heads * queries,](
                partial, partial_lse, out, lse, *out.stride(), heads, queries, splits,
                SHARES=SHARES, D=head_dim, WIDTH=tile_width(head_dim), num_warps=2, **OPTIONS,
            )  # fmt: skip
    return out, lse


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    wants_bias: bool,
    values: torch.Tensor | None = None,
    shortcut: float = 0.0,
) -> Gradients:
    """As `steps.Backend` says. The longer axis is split where the blocks of the other are too few."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    rule = in_rows(bias)
    with on_device(q):
        config = _config_of("grad_rows", q, queries, keys)
        programs = triton.cdiv(queries, config.block_m) * batch * heads
        splits = 1 if wants_bias else configs.split_count(programs, keys, config.block_n)
        grad_q = _shares(q, splits)
        unit = unit_of(grad, q, k, v, values, out, grad_q)
        grad_rows_kernel[programs, splits](
            grad, q, k, v, rule, values, out, lse, delta, grad_q,
            *strides(unit, grad, q, k, v), *spread(rule), *strides(unit, values, out),
            *share_strides(unit, grad_q),
            heads, heads // kv_heads, _group(values, heads), queries, keys, splits, scale, shortcut,
            **tile_constants(head_dim, config), EXACT=wants_bias, UNIT=unit,
        )  # fmt: skip
        config = _config_of("grad_keys", q, queries, keys)
        programs = triton.cdiv(keys, config.block_n) * batch * kv_heads
        splits = configs.split_count(programs, queries, config.block_m)
        grad_k, grad_v = _shares(k, splits), _shares(v, splits)
        unit = unit_of(grad, q, k, v, grad_k, grad_v)
        grad_keys_kernel[programs, splits](
            grad, q, k, v, rule, lse, delta, grad_k, grad_v,
            *strides(unit, grad, q, k, v), *spread(rule), *share_strides(unit, grad_k, grad_v),
            kv_heads, heads // kv_heads, queries, keys, splits, scale, **tile_constants(head_dim, config), UNIT=unit,
        )  # fmt: skip
        grad_bias = None
        if wants_bias and bias is not None:
            items, own_heads = bias.shape[:2]
            config = _config_of("grad_bias", q, queries, keys)
            unit = unit_of(grad, q, k, v)
            grid = triton.cdiv(queries, config.block_m) * items * own_heads, triton.cdiv(keys, config.block_n)
            shares = configs.split_count(math.prod(grid), (batch // items) * (heads // own_heads), 1)
            whole = torch.empty(shares, items, own_heads, queries, room(keys), dtype=torch.float32, device=q.device)
            grad_bias_kernel[(*grid, shares)](
                grad, q, k, v, rule, lse, delta, whole, *strides(unit, grad, q, k, v), *spread(rule),
                heads, heads // kv_heads, queries, keys, items, own_heads, batch // items, heads // own_heads, scale,
                **tile_constants(head_dim, config), UNIT=unit,
            )  # fmt: skip
            summed = whole[0] if shares == 1 else whole.sum(0)
            grad_bias = summed[..., :keys].sum_to_size(bias.shape).to(bias.dtype)
    return _summed(grad_q, q), _summed(grad_k, k), _summed(grad_v, v), grad_bias


def _shares(like: torch.Tensor, splits: int) -> torch.Tensor:
    """(..., splits, D): float32 to be summed, or one share that is the result itself, in its layout."""
    if splits == 1:
        return torch.empty_like(like)[..., None, :]
    return torch.empty(*like.shape[:3], splits, like.shape[3], dtype=torch.float32, device=like.device)


def _summed(shares: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return shares[..., 0, :] if shares.shape[3] == 1 else shares.sum(3).to(like.dtype)


def _config_of(kernel: str, q: torch.Tensor, queries: int, keys: int) -> Config:
    config = configs.choose(kernel, triton_target() or "", q.dtype, q.shape[-1])
    return configs.fit(kernel, config, queries, keys, tile_width(q.shape[-1]))


def _group(values: torch.Tensor | None, heads: int) -> int:
    return 1 if values is None else heads // values.shape[1]
