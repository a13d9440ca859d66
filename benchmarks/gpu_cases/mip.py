"""MIP (arXiv 2409.17920): text and several references in a cross-attention layer, beside the stock IP-Adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from attn_plugins.ops import weighted_merge
from attn_plugins.pipelines.benching.sides import FORWARD, Built, Prepared, Setting, Side
from benchmarks.gpu_cases.mip_definition import SampledMerge
from benchmarks.gpu_suite.case import Case, times

TEXT, ROWS = 77, 2  # tokens of the prompt, and of a phrase


@dataclass(frozen=True, kw_only=True)
class MergeCase(Case):
    """`tokens` positions, `references` of `image_tokens` each, with guidance (a batch of two).

    The baseline is what the stock adapter computes, its text and one attention over all image tokens: another result,
    whose price is the measure. `share` is baseline / ours: to pass it is 1 / 1.3. "plain" is the merge as its formula
    reads, a softmax over positions for each phrase and one attention for each reference. "text given" is what merging
    takes alone.

    FLUX's picture sees itself beside the prompt: its case has so many keys for `text`.
    """

    references: int
    image_tokens: int = 4
    text: int = TEXT
    suite: str = "mip"

    @property
    def shape(self) -> str:
        side = int(self.tokens**0.5)
        return times((side, side))

    @property
    def option(self) -> str:
        return f"{self.references} references of {self.image_tokens} tokens"

    def shrunk(self) -> MergeCase:
        return replace(self, tokens=169, heads=3, batch=2, head_dims=(16,), text=TEXT)

    def prepare(self, setting: Setting) -> Prepared:
        generator = torch.Generator(setting.device).manual_seed(0)

        def made(*shape: int) -> torch.Tensor:
            """As a projection leaves it: the heads beside their channels."""
            *front, heads, rows, dim = shape
            t = torch.randn(*front, rows, heads, dim, generator=generator, device=setting.device, dtype=setting.dtype)
            return t.transpose(-2, -3)

        batch, heads, dim, scale = self.batch, self.heads, setting.head_dim, setting.head_dim**-0.5
        text = (batch, heads, self.text, dim)
        images = (batch, self.references, heads, self.image_tokens, dim)
        leaves = (
            made(batch, heads, self.tokens, dim), made(*text), made(*text),
            made(1, self.references, heads, ROWS, dim), made(*images), made(*images),
        )  # fmt: skip
        lengths = torch.full((1, self.references), ROWS, device=setting.device)

        def stock(q, text_k, text_v, _, image_k, image_v):  # type: ignore[no-untyped-def]
            together = (t.transpose(1, 2).flatten(2, 3) for t in (image_k, image_v))
            return _attend(q, text_k, text_v) + _attend(q, *together)

        def plain(q, text_k, text_v, phrase_k, image_k, image_v):  # type: ignore[no-untyped-def]
            out = _attend(q, text_k, text_v)
            with torch.no_grad():
                wide = torch.promote_types(q.dtype, torch.float32)
                spread = ((scale * phrase_k) @ q[:, None].transpose(-1, -2)).to(wide).softmax(-1).mean((2, 3))
                weights = spread / spread.sum(1, keepdim=True)
            for i in range(self.references):
                attended = _attend(q, image_k[:, i], image_v[:, i])
                out = out + weights[:, i, None, :, None].to(q.dtype) * attended
            return out

        def ours(q, text_k, text_v, phrase_k, image_k, image_v):  # type: ignore[no-untyped-def]
            text = _attend(q, text_k, text_v)
            return weighted_merge(q, text, phrase_k, lengths, image_k, image_v, backend=setting.backend)

        def build_given() -> Built:
            text = _attend(*leaves[:3])

            def given(q, text_k, text_v, phrase_k, image_k, image_v):  # type: ignore[no-untyped-def]
                return weighted_merge(q, text, phrase_k, lengths, image_k, image_v, backend=setting.backend)

            return Built(given, 1.0)

        sides = (
            Side("stock", "dense", lambda: Built(stock, 1.0)),
            Side("plain", "peer", lambda: Built(plain, 1.0)),
            Side("text given", "part", build_given),
            Side("ours", "ours", lambda: Built(ours, 1.0)),
        )
        return Prepared(leaves, torch.randn_like(leaves[0]), SampledMerge(leaves, scale), sides, 1.0)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _case(name: str, tokens: int, heads: int, references: int = 2, **more) -> MergeCase:  # type: ignore[no-untyped-def]
    marks = {FORWARD: (1 / 1.3, 1 / 1.1)} if references == 2 else {}
    more = {"batch": 2, "head_dims": (64,), **more}
    return MergeCase(f"mip-{name}", tokens, heads, references=references, marks=marks, **more)


# SDXL's two levels at 1024 px, Stable Diffusion 1.5's finest at 512 px, FLUX at 1024 px for one prompt.
CASES = (
    _case("sdxl-4k", 4096, 10, quick=True),
    _case("sdxl-1k", 1024, 20),
    _case("sdxl-4k-plus", 4096, 10, image_tokens=16),
    _case("sdxl-4k-4", 4096, 10, references=4),
    _case("sd15-4k", 4096, 8, head_dims=(40,)),
    _case("flux-4k", 4096, 24, batch=1, head_dims=(128,), text=4096 + 512),
)
