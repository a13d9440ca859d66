"""What `agent_attention` is given: checks that need no value of a tensor."""

from __future__ import annotations

import torch

from attn_plugins.ops.checks import check_qkv


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    bias_aggregate: torch.Tensor | None,
    bias_broadcast: torch.Tensor | None,
    shortcut: float,
    exact_before: int,
    exact_after: int,
) -> None:
    """Shapes, dtypes and devices of the two steps.

    Raises:
        ValueError, TypeError: as `agent_attention` says.
    """
    check_qkv(q, k, v)
    batch, heads, queries, head_dim = q.shape
    want = (batch, heads, "n", head_dim)
    if agents.dim() != 4 or (*agents.shape[:2], agents.shape[3]) != (batch, heads, head_dim) or not agents.shape[2]:
        raise ValueError(f"agents {tuple(agents.shape)}: legal is ({', '.join(map(str, want))}) with n of 1 or more")
    if agents.dtype != q.dtype or agents.device != q.device:
        raise TypeError(f"agents are {agents.dtype} on {agents.device}: give them as q is, {q.dtype} on {q.device}")
    if not k.shape[2]:
        raise ValueError("k has no tokens: agents need one or more to gather from")
    if exact_before < 0 or exact_after < 0 or exact_before + exact_after >= queries:
        raise ValueError(
            f"exact_before={exact_before}, exact_after={exact_after} of {queries} rows: legal is 0 or more, with at "
            "least one row left for the agents; where all rows are exact, use plain attention"
        )
    if shortcut and k.shape[2] != queries:
        raise ValueError(f"shortcut={shortcut} adds v to the rows of q, {k.shape[2]} to {queries}: {_APART}")
    _check_bias("bias_aggregate", bias_aggregate, q, (batch, heads, agents.shape[2], k.shape[2]))
    _check_bias("bias_broadcast", bias_broadcast, q, (batch, heads, queries, agents.shape[2]))


def check_image(
    q: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, ...] | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cells: int,
    rows: int,
) -> None:
    """A convolution over `grid` of `cells` cells, which must fit into `rows` rows.

    Raises:
        ValueError, TypeError: as `agent_attention` says.
    """
    channels = q.shape[1] * q.shape[3]
    if grid is None:
        raise ValueError("dwc_weight convolves the values as an image: give its cells per axis, grid=(height, width)")
    if not 1 <= len(grid) <= 3 or min(grid) < 1 or cells > rows:
        raise ValueError(f"grid={grid}: legal are 1 to 3 axes of 1 or more cells, at most {rows} in all")
    if v.shape[2] != q.shape[2]:
        raise ValueError(f"dwc_weight adds an image of v to the rows of q, {v.shape[2]} to {q.shape[2]}: {_APART}")
    if weight.dim() != len(grid) + 2 or weight.shape[:2] != (channels, 1) or any(s % 2 == 0 for s in weight.shape[2:]):
        legal = ", ".join([str(channels), "1", *["odd"] * len(grid)])
        raise ValueError(f"dwc_weight {tuple(weight.shape)} over grid={grid}: legal is ({legal})")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"dwc_bias {tuple(bias.shape)}: legal is ({channels},)")


_APART = (
    "they must be as many. Bring the values to q's grid (F.interpolate) and add ops.agent.depthwise(values, grid, "
    "weight, bias) to the result"
)


def _check_bias(name: str, bias: torch.Tensor | None, q: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    if bias is None:
        return
    if bias.dim() != 4 or any(have not in (1, want) for have, want in zip(bias.shape, shape, strict=True)):
        legal = ", ".join("1" if want == 1 else f"1 or {want}" for want in shape)
        raise ValueError(f"{name} {tuple(bias.shape)}: legal is ({legal})")
    if bias.dtype != q.dtype or bias.device != q.device:
        raise TypeError(f"{name} is {bias.dtype} on {bias.device}: cast it to q's, {q.dtype} on {q.device}")
