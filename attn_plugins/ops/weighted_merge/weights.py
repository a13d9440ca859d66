"""From relevance to how much of each reference a position takes: what all backends share. Small tensors, (B, R, S)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

Scales = float | Sequence[float] | torch.Tensor


def check_options(temperature: float, masks: torch.Tensor | None, shape: tuple[int, int, int]) -> None:
    """`shape` is (B, R, S).

    Raises:
        ValueError: a temperature that is not positive, or masks of another shape.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: give a positive number (1 is the paper, infinity the mean)")
    batch, references, positions = shape
    if masks is not None and tuple(masks.shape) not in ((1, references, positions), shape):
        raise ValueError(f"masks {tuple(masks.shape)}: give (1 or {batch}, {references}, {positions}), one a reference")


def merge_weights(
    log_relevance: torch.Tensor, temperature: float, masks: torch.Tensor | None, null_bias: float | None
) -> torch.Tensor:
    """w (B, R, S), a softmax over the references of log(S r); all 0 where none is present."""
    absent = log_relevance == -math.inf
    columns = (log_relevance / temperature).masked_fill(absent, -math.inf)  # at infinity -inf / inf would be nan
    kept = None
    if masks is not None:
        kept = masks.to(columns).clamp(0.0, 1.0)
        columns = columns + kept.log()
    highest = columns.amax(1, keepdim=True)
    if null_bias is not None:
        nobody = null_bias / temperature
        highest = highest.clamp_min(nobody)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    shares = (columns - highest).exp()
    total = shares.sum(1, keepdim=True)
    if null_bias is not None:
        total = total + (nobody - highest).exp()
    weights = shares / total.masked_fill(total == 0.0, 1.0)
    return weights if kept is None else weights * kept.sum(1, keepdim=True).clamp_max(1.0)


def text_gate(text_out: torch.Tensor, text_weight: torch.Tensor) -> torch.Tensor:
    """t (B, 1 or R, S) from text_out (B, H, S, D): a sigmoid over its mean. In the log domain: the mean may underflow.

    Raises:
        ValueError: a weight of another size.
    """
    _, heads, positions, dim = text_out.shape
    if not text_weight.numel() or text_weight.numel() % (heads * dim):
        raise ValueError(
            f"text_weight {tuple(text_weight.shape)}: it has one number for each of {heads} x {dim} channels, for all "
            "references or for each"
        )
    weight = text_weight.reshape(-1, heads, dim).to(text_out.dtype)
    score = torch.einsum("bhsd,rhd->brs", text_out, weight).to(torch.promote_types(text_out.dtype, torch.float32))
    log_gate = F.logsigmoid(score)
    return (log_gate - log_gate.logsumexp(-1, keepdim=True) + math.log(max(positions, 1))).exp()


def coefficients(weights: torch.Tensor, scales: Scales, gate: torch.Tensor | None) -> torch.Tensor:
    """t w_i scale_i, (B, R, S); gate is t. Numbers are multiplied one by one where they differ: nothing is copied to a
    device.

    Raises:
        ValueError: another number of scales, or of rows of the gate, than of references.
    """
    if gate is not None:
        if gate.shape[1] not in (1, weights.shape[1]):
            raise ValueError(f"text_weight has {gate.shape[1]} rows: give one, or one for each of {weights.shape[1]}")
        weights = weights * gate
    if isinstance(scales, torch.Tensor):
        if scales.numel() not in (1, weights.shape[1]):
            raise ValueError(
                f"scales {tuple(scales.shape)}: give one, or one for each of {weights.shape[1]} references"
            )
        return weights * scales.to(weights).reshape(1, -1, 1)
    each = list(scales) if isinstance(scales, Sequence) else [scales]
    if len(each) not in (1, weights.shape[1]):
        raise ValueError(f"scales={scales!r}: give one, or one for each of {weights.shape[1]} references")
    if all(one == each[0] for one in each):
        return weights if each[0] == 1.0 else weights * float(each[0])
    return torch.stack([weights[:, i] * float(one) for i, one in enumerate(each)], dim=1)
