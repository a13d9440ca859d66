"""Dense attention of many small problems at once, with LSE, forward and backward: the CPU backend's inner step.

On a CPU this is ATen's flash kernel, called below `scaled_dot_product_attention` because that hides the LSE. Anywhere
else it is two matrix products.
"""

from __future__ import annotations

import torch

# Below F.scaled_dot_product_attention, which returns no LSE. (B, H, N, D) in, (out, lse (B, H, N)) out.
_HALVES = (torch.float16, torch.bfloat16)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention. q (B, R, T, D), k and v (B, R, E, D), bias broadcastable to (B, R, T, E) in q's dtype.

    `causal` takes the place of a bias: row r sees the keys up to r. Returns (out (B, R, T, D), lse (B, R, T), at least
    float32). What a row whose bias is all -inf gives is not defined.
    """
    if q.device.type == "cpu":
        q, k, v = _packed(q, k, v)
        if causal and scale <= 0:
            q, scale = _flipped(q, scale)
        alone = q.shape[2] == 1 and q.dtype in _HALVES
        if alone:  # a lone row takes a slower path, up to twice as long as two of them
            q = q.expand(-1, -1, 2, -1)
        out, lse = _flash(q, k, v, is_causal=causal, attn_mask=bias, scale=scale)
        if alone:
            out, lse = out[:, :, :1], lse[:, :, :1]
    else:
        scores = _scores(q, k, _later_keys(q, k) if causal else bias, scale)
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.exp(scores - _finite(lse)[..., None]).to(v.dtype) @ v
    return out, lse


def bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bias that leaves what is seen, and hides the rest."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def attend_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend` in q, k, v, for gradients of the output and (or None) of the LSE.

    `out` and `lse` may be those of a larger set of keys than k holds: the result is then k's part of the gradient.
    """
    lse = _finite(lse)
    if q.device.type != "cpu":
        bias = _later_keys(q, k) if causal else bias
        return _plain_backward(grad_out, grad_lse, q, k, v, out, lse, bias, scale)
    if causal and scale <= 0:
        q, positive = _flipped(q, scale)
        grad_q, grad_k, grad_v = attend_backward(grad_out, grad_lse, q, k, v, out, lse, bias, positive, causal)
        return (-grad_q, grad_k, grad_v) if scale else (torch.zeros_like(q), torch.zeros_like(k), grad_v)
    if grad_lse is None:
        grad_out, q, k, v, out = _packed(grad_out, q, k, v, out)
        return _flash_backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    # The kernel forms delta = rowsum(grad_out * out); the LSE's gradient enters as delta - grad_lse. One more column
    # (1 in grad_out, -grad_lse in out, 0 in q, k, v) does exactly that and touches nothing else.
    dim = q.shape[-1]
    q, k, v = (torch.nn.functional.pad(t, (0, 8)) for t in (q, k, v))
    grad_out, out = (torch.nn.functional.pad(t, (0, 8)) for t in (grad_out, out))
    grad_out[..., dim] = 1
    out[..., dim] = -grad_lse
    grads = _flash_backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    return tuple(grad[..., :dim] for grad in grads)


def _flipped(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores by a scale above 0: the causal kernel multiplies its -inf by the scale, which gives nan."""
    return (-q, -scale) if scale else (torch.zeros_like(q), 1.0)


def _plain_backward(grad_out, grad_lse, q, k, v, out, lse, bias, scale):  # type: ignore[no-untyped-def]
    probabilities = torch.exp(_scores(q, k, bias, scale) - lse[..., None])
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_scores = probabilities * ((grad_out @ v.transpose(-1, -2)).to(delta.dtype) - delta[..., None])
    grad_scores, probabilities = (grad_scores * scale).to(q.dtype), probabilities.to(q.dtype)
    return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ grad_out


def _later_keys(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.full((q.shape[-2], k.shape[-2]), float("-inf"), dtype=q.dtype, device=q.device).triu(1)


def _packed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The kernel takes the elements of a row to lie side by side, and does not check."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return scores if bias is None else scores + bias


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """0 in place of -inf: a row without keys then has probability exp(-inf) = 0 instead of nan."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
