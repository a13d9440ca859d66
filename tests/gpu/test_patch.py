"""patch() on a small Wan transformer that lives on the GPU: the kernels run, unpatched is bit-identical."""

from __future__ import annotations

import pytest
import torch

import attn_plugins
from tests.gpu.place import counted_launches

pytest.importorskip("diffusers")


@pytest.fixture
def model(place):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )  # fmt: skip
    return model.eval().to(place.device, torch.float32 if place.tiny else torch.bfloat16)


@pytest.fixture
def inputs(place, model):
    size = (3, 6, 8) if place.tiny else (9, 48, 64)
    rng = torch.Generator(place.device).manual_seed(1)
    options = {"generator": rng, "device": place.device, "dtype": model.dtype}
    return {
        "hidden_states": torch.randn(1, 16, *size, **options),
        "timestep": torch.full((1,), 500, device=place.device),
        "encoder_hidden_states": torch.randn(1, 8, 32, **options),
    }


SPARSE = {"window": 2, "stride": 1, "min_tokens": 0, "dense_steps": 0}


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def test_patch_run_unpatch(model, inputs):
    before = forward(model, inputs)
    attn_plugins.patch(model, "gna", **SPARSE)
    during = forward(model, inputs)
    assert torch.equal(during, forward(model, inputs)) and not torch.equal(during, before)
    attn_plugins.unpatch(model)
    assert torch.equal(forward(model, inputs), before)


def test_the_kernels_run_in_a_patched_model(model, inputs, on_gpu):
    attn_plugins.patch(model, "gna", **SPARSE)
    with counted_launches() as launched:
        forward(model, inputs)
    assert launched


def test_a_patched_model_compiles_whole(model, inputs, on_gpu):
    attn_plugins.patch(model, "gna", **SPARSE)
    plain = forward(model, inputs)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(forward(compiled, inputs), plain, rtol=0.02, atol=0.05)  # fused elsewhere, in bf16


def test_training_through_a_patched_model(model, inputs):
    attn_plugins.patch(model, "gna", **SPARSE)
    model(**inputs, return_dict=False)[0].float().square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "attn1.to_q.weight" in name]
    assert grads and all(g is not None and bool(torch.isfinite(g).all()) and bool(g.any()) for g in grads)
