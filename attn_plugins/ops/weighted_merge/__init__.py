"""`weighted_merge`: several reference images beside a text, each where its phrase says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_plugins.ops.checks import choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.weighted_merge.inputs import check_inputs
from attn_plugins.ops.weighted_merge.op import merge, reference_weights
from attn_plugins.ops.weighted_merge.reference import merge_reference, relevance_reference
from attn_plugins.ops.weighted_merge.weights import Scales, check_options, coefficients, merge_weights, text_gate


def weighted_merge(
    q: torch.Tensor,
    text_out: torch.Tensor,
    phrase_k: torch.Tensor,
    phrase_lengths: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    *,
    image_lengths: torch.Tensor | Sequence[int] | None = None,
    scales: Scales = 1.0,
    text_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    masks: torch.Tensor | None = None,
    null_bias: float | None = None,
    scale: float | None = None,
    phrase_q: torch.Tensor | None = None,
    return_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The weighted merge of MIP (arXiv 2409.17920, section 3.2): each position takes from the references that it shows.

        r_i(s) = mean over heads and rows of softmax over positions of (scale * phrase_k_i q^T)     relevance
        w_i(s) = r_i(s) / sum_j r_j(s)
        t(s)   = sigmoid(text_weight . text_out(s)) / mean over positions of the same               1 without it
        out    = text_out + sum_i t(s) w_i(s) scales_i softmax(scale * q image_k_i^T) image_v_i

    Relevance is computed in the log domain in float32 (float64 for float64), and no gradient runs through it: the
    weights are constants of the backward. One reference without masks, null column and text_weight is plain IP-Adapter.

    Args:
        q: (B, H, S, D), the queries of the S positions, any strides.
        text_out: (B, H, S, D), the layer's attention to its text, before the output projection.
        phrase_k: (1 or B, R, H, L, D), keys of the R phrases by the layer's own text projection, each encoded alone,
            without the row of the begin token.
        phrase_lengths: (1 or B, R) integers: the rows of each phrase that are real; what stands in the others is not
            read. A reference of 0 rows is absent: its weight is 0.
        image_k, image_v: (B, R, H, T, D), of the references' image tokens.
        image_lengths: the real ones of the T tokens: R numbers, or (1 or B, R) integers; None is all.
        scales: strength of the references: one, or R numbers, or a tensor (R,).
        text_weight: (H * D,), MIP's trained `text_to_weight`, or (R, H * D), one for each reference; None leaves t out.
        temperature: log r is divided by it: 1 is the paper, infinity the uniform mean.
        masks: (1 or B, R, S), where each reference may be: they multiply the relevance, r_i ** (1 / temperature) * m_i,
            and where all of them together are less than 1, the weights add up to that. Values are cut to 0..1. Hard
            masks that share out the positions leave w_i = m_i.
        null_bias: adds a column that takes weight and gives nothing, for what belongs to no reference. Its log
            relevance is null_bias - log S: at 0, that of a phrase that is everywhere alike. None: no such column.
        scale: of all scores; None is D ** -0.5.
        phrase_q: (B, H, S, D), the queries that meet phrase_k, where a layer asks its text with others than its images
            (FLUX rotates those for the text alone). None is q.
        return_weights: also return w, (B, R, S), in at least float32: who was put where. Neither t nor scales are in
            it.
        backend: "auto", "triton" (float16, bfloat16, float32; D up to 256), "cpu" (plain PyTorch on any device),
            "reference" (by definition).

    Returns:
        (B, H, S, D) in q's memory layout. Differentiable in q, text_out, image_k, image_v, scales and text_weight; the
        backward is plain PyTorch on every device.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together, or options out of range.
    """
    lengths = check_inputs(q, text_out, phrase_k, phrase_lengths, image_k, image_v, image_lengths, phrase_q)
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    check_options(temperature, masks, (q.shape[0], image_k.shape[1], q.shape[2]))
    told, keys = (q if phrase_q is None else phrase_q).detach(), phrase_k.detach()
    masks = None if masks is None else masks.detach()
    if chosen == "reference":
        weights = merge_weights(relevance_reference(told, keys, phrase_lengths, factor), temperature, masks, null_bias)
    else:
        options = (factor, float(temperature), null_bias, chosen == "triton")
        weights = reference_weights(told, keys, phrase_lengths, masks, *options)
    gate = None if text_weight is None else text_gate(text_out, text_weight)
    strengths = coefficients(weights, scales, gate)
    if chosen == "reference":
        out = merge_reference(q, text_out, image_k, image_v, strengths, lengths, factor)
    else:
        out = merge(q, text_out, image_k, image_v, strengths, lengths, factor, chosen == "triton")
    return (out, weights) if return_weights else out


__all__ = ["weighted_merge"]
