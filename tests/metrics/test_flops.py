"""The estimate from shapes against torch's own counter on running models."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attn_plugins.metrics.flops import step_flops
from attn_plugins.sequence import Sequence

diffusers = pytest.importorskip("diffusers")


def counted(model: nn.Module, inputs: dict, few_tokens: tuple[str, ...]) -> tuple[dict[str, float], float]:
    """(attention FLOPs by module, linear FLOPs inside the blocks without modules that end in `few_tokens`)."""
    # The counter does not know the CPU's fused kernel; in the plain form attention is two batched products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    name = type(model).__name__
    attention, linear = {}, 0.0
    for path, operations in counter.get_flop_counts().items():
        for operation, flops in operations.items():
            short = path.removeprefix(f"{name}.")
            if "bmm" in str(operation):
                attention[short] = attention.get(short, 0) + flops
            leaf = isinstance(dict(model.named_modules()).get(short), nn.Linear)
            if leaf and "blocks." in short and not short.endswith(few_tokens):
                linear += flops
    return attention, linear


def test_wan_without_text_in_the_sequence():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=40, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 4, 3, 8, 8),
        timestep=torch.tensor([5]),
        encoder_hidden_states=torch.randn(1, 7, 16),
    )
    attention, linear = counted(model, inputs, ("attn2.to_k", "attn2.to_v"))
    sites = [(f"blocks.{i}.{name}", kind) for i in range(2) for name, kind in (("attn1", "self"), ("attn2", "cross"))]
    estimate = step_flops(model, sites, Sequence((3, 4, 4)))
    assert estimate.attention == {f"blocks.{i}.attn1": attention[f"blocks.{i}.attn1"] for i in range(2)}
    assert estimate.linear == linear
    total = sum(estimate.attention.values())
    assert estimate.share == pytest.approx(total / (total + linear))


def test_flux_with_two_streams_and_modulation():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    ids = torch.zeros(24, 3)
    ids[:, 1], ids[:, 2] = torch.arange(24) // 6, torch.arange(24) % 6
    inputs = dict(
        hidden_states=torch.randn(1, 24, 4), encoder_hidden_states=torch.randn(1, 5, 32), timestep=torch.tensor([1.0]),
        pooled_projections=torch.randn(1, 32), img_ids=ids, txt_ids=torch.zeros(5, 3),
    )  # fmt: skip
    attention, linear = counted(model, inputs, ("norm.linear", "norm1.linear", "norm1_context.linear"))
    sites = [("transformer_blocks.0.attn", "joint"), ("single_transformer_blocks.0.attn", "joint")]
    estimate = step_flops(model, sites, Sequence((4, 6), text_before=5))
    assert estimate.attention == {name: attention[name] for name, _ in sites}
    assert estimate.linear == linear


def test_a_model_with_convolutions_has_no_share():
    block = nn.Module()
    block.to_q = nn.Linear(4, 6)
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    patch_embedding = nn.Conv2d(3, 4, 2, stride=2)
    model.add_module("patch_embedding", patch_embedding)
    assert step_flops(model, [("blocks.0", "self")], Sequence((3, 3))).share is not None
    model.add_module("conv", nn.Conv2d(4, 4, 3))
    estimate = step_flops(model, [("blocks.0", "self")], Sequence((3, 3)))
    assert estimate.share is None and estimate.attention == {"blocks.0": 4 * 81 * 6}
