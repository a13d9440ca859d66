"""The authors' layers with agents, from the paper's formulas: head by head, in float64, nothing of the library.

State dicts have the names and shapes of the authors' checkpoints (DeiT, PVT, Swin: an image or window; CSWin: stripes).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.support.tiny import randn

State = dict[str, torch.Tensor]


def state_dict(
    form: str, width: int, heads: int, grid: tuple[int, int], agents: int, own: int = 0, reduction: int = 1
) -> State:
    """Random weights of a layer; `form`: deit (with `own` tokens), swin, pvt, cswin."""
    rows, columns = grid
    shapes = {
        "an_bias": (heads, agents, 7, 7), "na_bias": (heads, agents, 7, 7),
        "ah_bias": (1, heads, agents, rows // reduction, 1), "aw_bias": (1, heads, agents, 1, columns // reduction),
        "ha_bias": (1, heads, rows, 1, agents), "wa_bias": (1, heads, 1, columns, agents),
    }  # fmt: skip
    convolution = "get_v" if form == "cswin" else "dwc"
    shapes |= {f"{convolution}.weight": (width, 1, 3, 3), f"{convolution}.bias": (width,)}
    if own:
        shapes |= {"ac_bias": (1, heads, agents, own), "ca_bias": (1, heads, own, agents)}
    linears = {"deit": {"qkv": 3, "proj": 1}, "swin": {"qkv": 3, "proj": 1}, "pvt": {"q": 1, "kv": 2, "proj": 1}}
    for name, times in linears.get(form, {}).items():
        shapes |= {f"{name}.weight": (times * width, width), f"{name}.bias": (times * width,)}
    if reduction > 1:
        shapes |= {"sr.weight": (width, width, reduction, reduction), "sr.bias": (width,)}
        shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: randn(*shape, seed=seed) * 0.4 for seed, (name, shape) in enumerate(shapes.items())}


def layer(state: State, x: torch.Tensor, heads: int, grid: tuple[int, int]) -> torch.Tensor:
    """DeiT, PVT and Swin (windows as batch items): x (B, N, width) to the same."""
    state, x = {name: t.double() for name, t in state.items()}, x.double()
    rows, columns = grid
    own = state["ac_bias"].shape[-1] if "ac_bias" in state else 0
    source, sizes = x, grid
    if "qkv.weight" in state:
        q, k, v = F.linear(x, state["qkv.weight"], state["qkv.bias"]).chunk(3, dim=-1)
    else:
        q = F.linear(x, state["q.weight"], state["q.bias"])
        if "sr.weight" in state:
            side = state["sr.weight"].shape[-1]
            image = x.transpose(1, 2).reshape(x.shape[0], -1, rows, columns)
            image = F.conv2d(image, state["sr.weight"], state["sr.bias"], stride=side)
            sizes = tuple(image.shape[2:])
            source = F.layer_norm(image.flatten(2).mT, image.shape[1:2], state["norm.weight"], state["norm.bias"])
        k, v = F.linear(source, state["kv.weight"], state["kv.bias"]).chunk(2, dim=-1)
    out = attention(state, q, k, v, heads, grid, sizes, own)
    return F.linear(out, state["proj.weight"], state["proj.bias"])


def stripes(state: State, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, image: int) -> torch.Tensor:
    """CSWin: (B, image * image, width) each, stripe by stripe; their size is that of the line biases."""
    state = {name.replace("get_v", "dwc"): t.double() for name, t in state.items()}
    high, wide = state["ha_bias"].shape[2], state["wa_bias"].shape[3]
    out = torch.empty(q.shape, dtype=torch.float64)
    for top in range(0, image, high):
        for left in range(0, image, wide):
            places = [r * image + c for r in range(top, top + high) for c in range(left, left + wide)]
            parts = (t[:, places].double() for t in (q, k, v))
            out[:, places] = attention(state, *parts, heads, (high, wide), (high, wide), 0)
    return out


def attention(
    state: State, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
    grid: tuple[int, int], key_grid: tuple[int, int], own: int,
) -> torch.Tensor:  # fmt: skip
    """Pool, gather, broadcast, convolve: (B, N, width) of each to (B, N, width), before the last projection."""
    batch, _, width = q.shape
    count = state["an_bias"].shape[1]
    side, size = round(count**0.5), width // heads
    image = q[:, own:].mT.reshape(batch, width, *grid)
    means = F.adaptive_avg_pool2d(image, (side, side)).reshape(batch, width, count).mT
    gather, read = biases(state, grid, key_grid)
    out = torch.empty_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        agents = means[..., part]
        weights = torch.softmax(agents @ k[..., part].mT / size**0.5 + gather[head], dim=-1)
        found = weights @ v[..., part]
        out[..., part] = torch.softmax(q[..., part] @ agents.mT / size**0.5 + read[head], dim=-1) @ found
    values = v[:, own:].mT.reshape(batch, width, *key_grid)
    if key_grid != grid:
        values = F.interpolate(values, size=grid, mode="bilinear")
    texture = F.conv2d(values, state["dwc.weight"], state["dwc.bias"], padding=1, groups=width)
    out[:, own:] += texture.flatten(2).mT
    return out


def biases(state: State, grid: tuple[int, int], key_grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the scores of agents by keys (heads, n, Nk) and of queries by agents (heads, Nq, n)."""
    gather = F.interpolate(state["an_bias"], size=key_grid, mode="bilinear").flatten(2)
    gather = gather + (state["ah_bias"] + state["aw_bias"])[0].flatten(2)
    read = F.interpolate(state["na_bias"], size=grid, mode="bilinear").flatten(2).mT
    read = read + (state["ha_bias"] + state["wa_bias"])[0].flatten(1, 2)
    if "ac_bias" in state:
        gather = torch.cat([state["ac_bias"][0], gather], dim=-1)
        read = torch.cat([state["ca_bias"][0], read], dim=-2)
    return gather, read
