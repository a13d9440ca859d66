"""MoH in single calls: parts of the heads, threads, recomputation, measuring, inputs that are not seen."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from attn_plugins.method import AttentionCall
from attn_plugins.methods.moh import MoHConfig, MoHProcessor, Routing
from attn_plugins.weights import modules as modules_of
from tests.support import tiny_vision
from tests.support.moh import patch, scrambled
from tests.support.tiny import randn
from tests.support.tiny_language import positions, prompt, tiny

pytestmark = pytest.mark.filterwarnings("ignore:attn_plugins. skip_projections")
ROUTED = {"router": "learned", "active": 0.75}


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions(mask)).logits


def test_each_device_has_its_part_of_the_heads() -> None:
    """Tensor parallelism: the router is whole everywhere, and the gates of the heads that are here are taken."""
    processor = MoHProcessor(MoHConfig(router="ridge", active=0.5))
    q, k, v = (randn(2, 4, 9, 8, seed=seed) for seed in (1, 2, 3))
    gates = (randn(2, 9, 4, seed=4) > 0).float()
    prepared = Routing(gates, gates[..., 1:], gates[..., 1:] > 0)

    def call(heads: slice, **more: Any) -> AttentionCall:
        return AttentionCall(
            q[:, heads], k[:, heads], v[:, heads], "causal", causal=True, weights=object(), prepared=prepared, **more
        )  # fmt: skip

    whole = processor(call(slice(None)))
    parts = [processor(call(slice(i, i + 2), first_head=i, layer_heads=4)) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    norms = MoHProcessor(MoHConfig(router="query_norm"))
    assert "each device holds a part" in str(norms.refuses(call(slice(0, 2), first_head=0, layer_heads=4)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_diffusion_models_train_under_checkpointing(reentrant: bool, quiet_diffusers: None) -> None:
    from tests.support.tiny_models import MODELS

    model, given = MODELS["wan"].build().train(), MODELS["wan"].inputs(2, 0)
    handle = scrambled(patch(model, active=0.5, scale="paper"))  # of two heads, a gate in the code's scale is always 1
    given["hidden_states"].requires_grad_()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**given, return_dict=False)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    assert all(want[name].abs().max() > 0 for name, _ in handle.named_weights())

    def checkpoint(function: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    model.enable_gradient_checkpointing(checkpoint)
    found = gradients()
    assert found.keys() == want.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-7)


def test_measuring_a_run_leaves_it_as_it_is() -> None:
    model = tiny("Llama")
    ids, mask = prompt()
    handle = scrambled(patch(model, **ROUTED))
    want = logits(model, ids, mask)
    with handle.measure() as measures:
        assert torch.equal(logits(model, ids, mask), want)
    assert "model.layers.0" in measures.table() or measures.table()


def test_a_layer_whose_input_is_not_seen_runs_dense() -> None:
    model, given = tiny_vision.build("ViT"), tiny_vision.inputs("ViT", 1)
    dense = tiny_vision.features("ViT", model, given)
    patch(model, active=0.5)
    for block in model.layers:
        attention = block.attention
        attention.forward = lambda x, f=attention.forward: f(hidden_states=x)  # called past the hooks
        block.attention = torch.nn.Module()
        block.attention.forward = lambda x, *a, m=attention, **k: m.forward(x)
    with pytest.warns(UserWarning, match="what enters this layer was not seen"):
        assert torch.equal(tiny_vision.features("ViT", model, given), dense)


def test_threads_route_their_own_tokens() -> None:
    """Two threads run one model, each waiting behind its layer's router for the other."""
    model = tiny("Llama")
    scrambled(patch(model, **ROUTED))
    texts = [prompt(tokens=9)[0], prompt(tokens=9)[0].flip(1)]
    want = [logits(model, ids, torch.ones_like(ids)) for ids in texts]
    both = threading.Barrier(2, timeout=30)

    def wait(module: Any, args: Any) -> None:
        both.wait()

    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_pre_hook(wait)
    found: list[Any] = [None, None]

    def run(index: int) -> None:
        found[index] = logits(model, texts[index], torch.ones_like(texts[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("router", ["learned", "ridge", "query_norm"])
def test_shapes_alone_go_through_on_meta(router: str) -> None:
    model = tiny("Llama").to("meta")
    patch(model, router=router, active=0.5, skip_projections=router != "query_norm")
    ids = torch.zeros(2, 600, dtype=torch.long, device="meta")
    with torch.no_grad():
        assert model(ids).logits.shape[:2] == (2, 600)


def test_patching_under_another_default_device() -> None:
    model, other = tiny("Llama"), tiny("Llama")
    patch(model, **ROUTED)
    with torch.device("meta"):
        patch(other, **ROUTED)
    for (name, found), want in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, want), name


@pytest.mark.parametrize("mode", ["all_params", "shared_kv", "mean"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_mixtures_of_bam_have_the_heads_of_all_their_experts(name: str, mode: str) -> None:
    from attn_plugins.methods.moh import calibrate
    from tests.support import bam

    model, ids = bam.mixture(name, mode), bam.ids()
    want = model(ids).logits
    heads = 4 if mode == "mean" else 12
    for active, router in ((1.0, "ridge"), (0.5, "ridge"), (0.5, "learned")):
        handle = patch(model, active=active, router=router)
        calibrate(handle, [ids], progress=False)
        routers = [weights for _, weights in modules_of(model, handle.patches[0])]
        assert [router.budget.units for router in routers] == [heads] * 2
        assert torch.equal(model(ids).logits, want) == (active == 1.0)
        handle.remove()
        assert torch.equal(model(ids).logits, want)
