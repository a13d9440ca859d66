"""How far predictions are from the dense model's: KL divergence and agreement of the first choice, one by one."""

from __future__ import annotations

import torch

CHUNK = 256  # predictions at a time: a vocabulary of 128k in float64 is 1 MB for each


def kl_divergence(dense: torch.Tensor, patched: torch.Tensor) -> torch.Tensor:
    """KL(dense || patched) of each prediction in nats: sum over the classes of p_dense * (log p_dense - log p_patched).

    Computed in float64, in chunks. 0 where the logits are equal or differ by a constant. Classes that dense rules out
    (-inf) add nothing; one that only the patched model rules out makes it infinite.

    Args:
        dense, patched: logits (..., classes), float, of one shape.

    Returns:
        (...) float64, on the CPU, at least 0.

    Raises:
        ValueError: shapes that differ, no classes, or logits that are not float.
    """
    _check(dense, patched)
    rows = [t.reshape(-1, t.shape[-1]) for t in (dense.detach(), patched.detach())]
    found = []
    for a, b in zip(*(t.split(CHUNK) for t in rows), strict=True):
        p, q = (t.double().log_softmax(-1) for t in (a, b))
        terms = p.exp() * (p - q)
        found.append(terms.masked_fill(p == -torch.inf, 0.0).sum(-1).clamp(min=0).cpu())
    return torch.cat(found).view(dense.shape[:-1]) if found else torch.zeros(dense.shape[:-1], dtype=torch.float64)


def top1_agreement(dense: torch.Tensor, patched: torch.Tensor) -> torch.Tensor:
    """Whether the most probable class is the same: logits (..., classes) -> (...) bool, on the CPU.

    Raises:
        ValueError: as `kl_divergence`.
    """
    _check(dense, patched)
    return (dense.argmax(-1) == patched.argmax(-1)).cpu()


def _check(dense: torch.Tensor, patched: torch.Tensor) -> None:
    if dense.shape != patched.shape or dense.ndim < 1 or not dense.shape[-1]:
        raise ValueError(
            f"shapes {tuple(dense.shape)} and {tuple(patched.shape)}: give two equal shapes (..., classes)"
        )
    if not (dense.is_floating_point() and patched.is_floating_point()):
        raise ValueError(f"dtypes {dense.dtype} and {patched.dtype}: give float logits")
