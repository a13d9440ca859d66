"""A cross-attention layer that merges references against the stock IP-Adapter layer on this CPU, as CSV rows.

    python benchmarks/cpu_mip.py [--quick] [--out benchmarks/results/cpu_mip.csv]

Whole layers of diffusers at the shapes of SDXL and of Stable Diffusion 1.5, projections included, with 77 text tokens
and guidance (a batch of two): `stock_ms` by diffusers' own processor, `mip_ms` by ours with phrases of `rows` tokens,
whose keys are kept as they are over the steps. FLUX: joint attention of a double block with 512 text tokens, one prompt
(`benchmarks/mip_flux.py`). `plain_ms` is the same merge written as its formula reads: a softmax over positions for each
phrase, one attention for each reference.

`ratio` is mip / stock, `ratio_plain` plain / stock: the price of the merge, to pass it is 1.3 for two references. The
sides run interleaved; ratios are of medians. A wrong result is not timed: ours is first compared with the plain side.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.methods.mip import MIPConfig, MIPProcessor  # noqa: E402
from attn_plugins.patches.interception import STATE  # noqa: E402
from attn_plugins.patches.phrases import LayerPhrases, Phrases  # noqa: E402
from attn_plugins.patches.processors.mip_ip_adapter import MIPAttnProcessor2_0  # noqa: E402
from attn_plugins.runtime import Layer, RootState  # noqa: E402
from attn_plugins.schedule import Schedule  # noqa: E402
from benchmarks import mip_flux  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# name -> positions, channels, heads, channels of the text
LAYERS = {
    "sdxl-4096": (4096, 640, 10, 2048),
    "sdxl-1024": (1024, 1280, 20, 2048),
    "sd15-4096": (4096, 320, 8, 768),
    "sd15-1024": (1024, 640, 8, 768),
    "flux-1024": (1024, 3072, 24, 4096),
    "flux-4096": (4096, 3072, 24, 4096),
}
QUICK = ("sdxl-4096", "sdxl-1024", "flux-1024")
BATCH, TEXT, ROWS = 2, 77, 2


def measure(name: str, references: int, tokens: int, dtype: str, seconds: float) -> dict[str, object]:
    """One row."""
    positions, channels, heads, width = LAYERS[name]
    make = mip_flux.sides if name.startswith("flux") else sides
    with torch.no_grad():
        runs = make(name, LAYERS[name], references, tokens, ROWS, DTYPES[dtype])
        check(runs["mip"](), runs["plain"]())
        times = interleaved(runs, seconds=seconds)
    return {
        "layer": name, "positions": positions, "channels": channels, "heads": heads, "references": references,
        "tokens": tokens, "rows": ROWS, "dtype": dtype,
        **{f"{side}_ms": round(time, 2) for side, time in times.items()},
        "ratio": round(times["mip"] / times["stock"], 3), "ratio_plain": round(times["plain"] / times["stock"], 3),
    }  # fmt: skip


def sides(
    name: str, shape: tuple[int, int, int, int], references: int, tokens: int, rows: int, kind: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """A layer of Stable Diffusion as stock, mip and plain compute it."""
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    positions, channels, heads, width = shape
    torch.manual_seed(0)
    attn = Attention(channels, cross_attention_dim=width, heads=heads, dim_head=channels // heads).to(kind)
    stock = IPAdapterAttnProcessor2_0(channels, width, num_tokens=(tokens,), scale=[0.75]).to(kind)
    ours = MIPAttnProcessor2_0(channels, width, num_tokens=(tokens,), scale=[0.75]).to(kind)
    ours.load_state_dict(stock.state_dict())
    x, text = torch.randn(BATCH, positions, channels, dtype=kind), torch.randn(BATCH, TEXT, width, dtype=kind)
    images = [torch.randn(BATCH, references, tokens, width, dtype=kind)]
    names = tuple(f"thing {index}" for index in range(references))
    phrases = Phrases(names, torch.randn(1, references, rows, width, dtype=kind), torch.full((1, references), rows))
    layer = Layer(RootState(Schedule(0)), MIPProcessor(MIPConfig(phrases=names)), "cross", name, 0)
    layer.references = LayerPhrases(phrases, None)
    attn.__dict__[STATE] = layer

    def run(processor: Any) -> torch.Tensor:
        return processor(attn, x, (text, images))

    return {
        "stock": lambda: run(stock), "mip": lambda: run(ours),
        "plain": lambda: plain(attn, stock, x, text, images[0], phrases, 0.75),
    }  # fmt: skip


def plain(
    attn: Any, adapter: Any, x: torch.Tensor, text: torch.Tensor, images: torch.Tensor, phrases: Phrases, scale: float
) -> torch.Tensor:
    """The layer as its formula reads."""

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (attn.heads, -1)).transpose(-2, -3)

    q, k, v = split(attn.to_q(x)), split(attn.to_k(text)), split(attn.to_v(text))
    out = F.scaled_dot_product_attention(q, k, v)
    keys = split(attn.to_k(phrases.rows))  # (1, R, H, L, D)
    relevances = [
        torch.softmax((keys[:, i] * q.shape[-1] ** -0.5) @ q.transpose(-1, -2), dim=-1).mean((1, 2))
        for i in range(images.shape[1])
    ]
    total = torch.stack(relevances).sum(0)
    for i, relevance in enumerate(relevances):
        attended = F.scaled_dot_product_attention(
            q, split(adapter.to_k_ip[0](images[:, i])), split(adapter.to_v_ip[0](images[:, i]))
        )
        out = out + scale * (relevance / total)[:, None, :, None] * attended
    return attn.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype))


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[found.dtype]
    if not error <= limit:
        raise SystemExit(f"relative error {error:.2e} above {limit:.0e}; a wrong result is not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two references in SDXL's layers and one of FLUX")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_mip.csv"))
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--references", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--tokens", nargs="*", type=int, default=[4, 16])
    parser.add_argument("--dtypes", nargs="*", default=["fp32"], choices=list(DTYPES))
    arguments = parser.parse_args()
    layers, references = arguments.layers, arguments.references
    if arguments.quick:
        layers, references = [name for name in layers if name in QUICK], [2]
    plan = list(itertools.product(layers, references, arguments.tokens, arguments.dtypes))
    seconds = 1.0 if arguments.quick else 5.0
    write_rows(plan, lambda case: measure(*case, seconds), arguments.out)


if __name__ == "__main__":
    main()
