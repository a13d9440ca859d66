"""`merge_attention_states`: attention over disjoint sets of keys, joined into attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def merge_attention_states(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over a union of disjoint key sets from the attention over each (FlashAttention, 2205.14135).

    Args:
        outputs: of (B, H, N, D), one for each set of keys.
        lses: of (B, H, N), natural log; -inf where a query saw no key of that set.

    Returns:
        (output (B, H, N, D) in the first output's dtype, lse (B, H, N)); 0 and -inf where no set has a key. Both are
        differentiable in outputs and LSEs.

    Raises:
        ValueError: no states, as many LSEs as outputs not given, or shapes that differ.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"{len(outputs)} outputs and {len(lses)} LSEs: give one LSE for each output, at least one")
    for out, lse in zip(outputs, lses, strict=True):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"output {tuple(out.shape)} with LSE {tuple(lse.shape)}: all outputs share one shape (B, H, N, D), "
                "and an LSE has it without D"
            )
    stacked = torch.stack(list(lses)).to(torch.promote_types(lses[0].dtype, torch.float32))
    empty = (stacked == float("-inf")).all(0)
    lse = torch.logsumexp(stacked.masked_fill(empty, 0.0), dim=0).masked_fill(empty, float("-inf"))
    weights = torch.softmax(stacked.masked_fill(empty, 0.0), dim=0).masked_fill(empty, 0.0)
    merged = sum(weight[..., None] * out for weight, out in zip(weights, outputs, strict=True))
    assert isinstance(merged, torch.Tensor)  # there is at least one state
    return merged.to(outputs[0].dtype), lse
