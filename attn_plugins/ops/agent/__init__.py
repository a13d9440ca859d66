"""`agent_attention`: attention through a few agents, and the pooling that makes them."""

from __future__ import annotations

import torch

from attn_plugins.ops.agent.depthwise import depthwise, image_rows
from attn_plugins.ops.agent.inputs import check_inputs
from attn_plugins.ops.agent.op import agent
from attn_plugins.ops.agent.pooling import agent_centres, agent_grid, pool_tokens, pooled_grid
from attn_plugins.ops.agent.reference import agent_reference
from attn_plugins.ops.checks import choose_backend, kernel_refusal, resolve_scale


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    *,
    scale_aggregate: float | None = None,
    scale_broadcast: float | None = None,
    bias_aggregate: torch.Tensor | None = None,
    bias_broadcast: torch.Tensor | None = None,
    shortcut: float = 0.0,
    dwc_weight: torch.Tensor | None = None,
    dwc_bias: torch.Tensor | None = None,
    grid: tuple[int, ...] | None = None,
    exact_before: int = 0,
    exact_after: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Agent Attention (arXiv 2312.08874, section 3.2): n agents gather from all keys, and all queries read the agents.

        gathered = softmax(scale_aggregate * agents k^T + bias_aggregate) v          (B, H, n, D)
        out = softmax(scale_broadcast * q agents^T + bias_broadcast) gathered        (B, H, Nq, D)

    It costs 4 n (Nq + Nk) D operations a head, where attention costs 4 Nq Nk D: less as long as n < N / 2.

    The exact rows, those of text or of a class token, stand at q's ends and are queries of the first step beside the
    agents: they attend to all keys, with `scale_aggregate` (give it the model's own scale) and no bias, shortcut or
    convolution. They do not become agents: the other rows read what the n agents gathered (which text is part of), so
    that biases keep their n columns. A class token of the trained models is no exact row: it reads the agents as the
    patches do, under its own rows of the biases.

    Args:
        q: (B, H, Nq, D), any strides.
        k, v: (B, H_kv, Nk, D); H is a multiple of H_kv. Nk may differ from Nq.
        agents: (B, H, n, D), usually `pool_tokens` of the queries.
        scale_aggregate, scale_broadcast: of the scores of either step; None is D ** -0.5.
        bias_aggregate: added to the first scores, (1 or B, 1 or H, 1 or n, 1 or Nk), in q's dtype.
        bias_broadcast: added to the second, (1 or B, 1 or H, 1 or Nq, 1 or n); the exact rows' part is not used.
        shortcut: this times v is added to every row that is not exact; needs Nk = Nq.
        dwc_weight: a depthwise convolution of the values as an image, added to the rows of `grid`: (H * D, 1, s, ...)
            with one odd s per axis of the grid, as in `torch.nn.Conv2d(groups=H * D)`; needs Nk = Nq. On every
            backend it is PyTorch's own convolution, after the attention.
        dwc_bias: (H * D,).
        grid: cells per axis of the image that the convolution sees: the last prod(grid) rows before the exact ones at
            the end. Rows before it (class or register tokens) get no convolution.
        exact_before, exact_after: rows at either end of q that get full attention.
        backend: "auto" ("triton" on CUDA and ROCm, else "cpu"), "triton" (float16, bfloat16, float32; head sizes up to
            256), "cpu" (plain PyTorch on any device), "reference" (dense, by definition).

    Returns:
        (B, H, Nq, D) in q's memory layout. Differentiable in all tensors.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together.
    """
    check_inputs(q, k, v, agents, bias_aggregate, bias_broadcast, shortcut, exact_before, exact_after)
    scales = resolve_scale(scale_aggregate, q.shape[-1]), resolve_scale(scale_broadcast, q.shape[-1])
    image = image_rows(q, v, grid, dwc_weight, dwc_bias, exact_before, exact_after)
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    rest = (bias_aggregate, bias_broadcast, scales, float(shortcut), (exact_before, exact_after))
    if chosen == "reference":
        out = agent_reference(q, k, v, agents, *rest)
    else:
        out = agent(q, k, v, agents, *rest, chosen == "triton")[0]
    if image is None or grid is None or dwc_weight is None:
        return out
    texture = depthwise(v[:, :, image], grid, dwc_weight, dwc_bias)
    return out + torch.nn.functional.pad(texture, (0, 0, image.start, q.shape[2] - image.stop))


__all__ = ["agent_attention", "agent_centres", "agent_grid", "depthwise", "pool_tokens", "pooled_grid"]
