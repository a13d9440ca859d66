"""A whole attention layer with routed heads on this CPU, projections included, as CSV rows.

    python benchmarks/cpu_moh.py [--quick] [--out benchmarks/results/cpu_moh.csv]

One layer of a Llama (causal) and of a ViT (bidirectional), of random weights, patched with "moh" and a router that is
fitted to random tokens; so heads go to tokens as a calibrated router deals them out. Sides run interleaved, ratios are
of medians: dense, routed, and with `skip_projections`. The bounds are what the layer's multiplications allow: those of
queries, outputs and attention itself shrink, those of keys and values do not, and the router's come on top. A wrong
result is not timed: both routed sides are first compared.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attn_plugins  # noqa: E402
from attn_plugins.methods.moh import calibrate  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH, HEADS = 1024, 16


def layer_of(kind: str, tokens: int, dtype: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of one layer with nearly nothing around it, and its input."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": HEADS
    }  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=64)
        ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1))
        return transformers.LlamaModel(config).eval().to(DTYPES[dtype]), {"input_ids": ids}
    side = round(tokens**0.5)
    config = transformers.ViTConfig(**sizes, image_size=side, patch_size=1)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    return transformers.ViTModel(config, add_pooling_layer=False).eval().to(DTYPES[dtype]), {
        "pixel_values": pixels.to(DTYPES[dtype])
    }


def measure(kind: str, tokens: int, dtype: str, active: float, seconds: float) -> dict[str, object]:
    """One row."""
    model, inputs = layer_of(kind, tokens, dtype)
    sides = {"dense": model}
    for name, skip in (("routed", False), ("skipping", True)):
        sides[name], _ = layer_of(kind, tokens, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="attn_plugins: moh:")
            handle = attn_plugins.patch(sides[name], "moh", router="ridge", active=active, skip_projections=skip)
        calibrate(handle, [inputs], progress=False)
    with torch.no_grad():
        found = {name: one(**inputs)[0] for name, one in sides.items()}
        error = (found["routed"] - found["skipping"]).abs().max().item()
        if not error <= (1e-4 if dtype == "fp32" else 0.1) or torch.equal(found["dense"], found["routed"]):
            raise SystemExit(f"error {error:.2e}; a wrong result is not timed")
        times = interleaved({name: lambda one=one: one(**inputs) for name, one in sides.items()}, seconds=seconds)
    kv = 4 if kind == "llama" else HEADS
    core = tokens * WIDTH * 2 * (0.5 if kind == "llama" else 1.0)  # multiplications of a token
    projections, fixed, router = 2 * WIDTH * WIDTH, 2 * WIDTH * WIDTH * kv / HEADS, WIDTH * HEADS * 3 / 4
    whole = core + projections + fixed
    bounds = {
        "bound_routed": whole / (active * core + projections + fixed + router),
        "bound_skipping": whole / (active * (core + projections) + fixed + router),
    }
    return {
        "layer": kind, "tokens": tokens, "width": WIDTH, "heads": HEADS, "kv_heads": kv, "dtype": dtype,
        "active": active,
        **{f"{name}_ms": round(time, 2) for name, time in times.items()},
        **{f"speedup_{name}": round(times["dense"] / times[name], 2) for name in ("routed", "skipping")},
        **{name: round(bound, 2) for name, bound in bounds.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,025 tokens, a second a problem")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_moh.csv"))
    parser.add_argument("--tokens", nargs="*", type=int, default=[2025, 4096])
    arguments = parser.parse_args()
    tokens = [2025] if arguments.quick else arguments.tokens
    cases = list(itertools.product(("llama", "vit"), tokens, DTYPES, (0.5, 0.75)))
    seconds = 1.0 if arguments.quick else 4.0
    write_rows(cases, lambda case: measure(*case, seconds), arguments.out)


if __name__ == "__main__":
    main()
