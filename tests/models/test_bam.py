"""What a mixture computes: the dense model, one expert, or the sum that the paper writes (arXiv 2408.08274)."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.models.bam.attention import BamAttention
from attn_plugins.models.bam.feed_forward import BamFeedForward
from tests.support.bam import MODES, NAMES, all_to, dense, error, expert, ids, loud, mixed, mixture

CLOSE = 2e-6  # float32: N times as many terms in the output projection's sums


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_identical_experts_are_the_dense_model_with_any_router(name, mode):
    base = dense(name)
    model = loud(mixed([base, base, base], mode, allow_identical=True))
    with torch.no_grad():
        wanted = base(ids()).logits
        assert error(model(ids()).logits, wanted) < CLOSE
        for weight in (w for n, w in model.named_parameters() if "down_proj" in n and not n.endswith("bias")):
            weight *= 1.001  # all experts, as any of them may have no token: what they differ in is seen
        assert error(model(ids()).logits, wanted) > CLOSE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_one_hot_router_is_its_expert(name, mode):
    base = dense(name)
    experts = [base, expert(base, 1, mode), expert(base, 2, mode)]
    model = mixed(experts, mode)
    for number in range(len(experts)):
        with torch.no_grad(), all_to(model, number):
            found = model(ids()).logits
        for other, wanted in enumerate(experts):
            with torch.no_grad():
                assert (error(found, wanted(ids()).logits) < CLOSE) == (other == number), (number, other)


def attention_of(model):
    return next(module for module in model.modules() if isinstance(module, BamAttention))


def naive(name, model, experts, x, positions):
    """sum_i g_i(x) MHA_i(x) with each expert's own dense attention, one after the other."""
    attention = attention_of(model)
    _, gates = attention.mix.router(x)
    row = attention.architecture
    out = 0.0
    for number, own in enumerate(experts):
        layer = getattr(own, row.body).layers[0]
        found = getattr(layer, row.attention)(x, attention_mask=None, position_embeddings=positions)[0]
        out = out + gates[..., number, None] * found
    return out


@pytest.mark.parametrize("mode", ["all_params", "shared_kv"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_attention_is_the_sum_of_gated_experts(name, mode):
    base = dense(name)
    experts = [base, expert(base, 1), expert(base, 2)]  # k and v differ too
    model = loud(mixed(experts, mode))
    if mode == "shared_kv":
        share_keys_and_values(experts)
    x = torch.randn(2, 6, 32)
    body = getattr(model, model.base_model_prefix)
    positions = body.rotary_emb(x, torch.arange(6)[None])
    found = attention_of(model)(x, attention_mask=None, position_embeddings=positions)[0]
    wanted = naive(name, model, experts, x, positions)
    assert error(found, wanted) < CLOSE
    assert error(found.roll(1, 1), wanted) > 0.1


def share_keys_and_values(experts):
    """Every expert gets the mean of all k and v, in place."""
    states = [own.state_dict() for own in experts]
    for name in states[0]:
        if any(part in name for part in ("k_proj", "v_proj", "k_norm", "k_layernorm")):
            mean = torch.stack([state[name].double() for state in states]).mean(0).float()
            for state in states:
                state[name].copy_(mean)
        if "query_key_value" in name:
            seen = [state[name].view(4, 3, 8, -1)[:, 1:] for state in states]
            mean = torch.stack(seen).double().mean(0).float()
            for part in seen:
                part.copy_(mean)


def feed_forward_of(model):
    return next(module for module in model.modules() if isinstance(module, BamFeedForward))


@pytest.mark.parametrize("gate", ["unit", "paper"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi"])
@torch.no_grad()
def test_feed_forward_is_the_top_of_gated_experts(name, top_k, gate):
    base = dense(name)
    experts = [base, expert(base, 1), expert(base, 2)]
    model = loud(mixed(experts, top_k=top_k, gate=gate))
    block, x = feed_forward_of(model), torch.randn(2, 5, 32)
    _, shares = block.router(x)
    each = torch.stack([own.model.layers[0].mlp(x) for own in experts], -1)
    kept = shares * (shares >= shares.topk(top_k, -1).values[..., -1:])
    weights = kept if gate == "paper" else kept / kept.sum(-1, keepdim=True)
    wanted = (each * weights[..., None, :]).sum(-1)
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        assert error(block(x), wanted) < CLOSE, implementation
    assert error(block(x), (each * shares[..., None, :]).sum(-1)) > 1e-3


def test_papers_gate_scales_the_feed_forwards_of_a_new_mixture_and_unit_does_not():
    base = dense("qwen2")
    x = torch.randn(2, 5, 32)
    scales = {}
    for gate in ("paper", "unit"):
        block = feed_forward_of(mixed([base, base], gate=gate, allow_identical=True))
        with torch.no_grad():
            scales[gate] = float((block(x) / base.model.layers[0].mlp(x)).median())
    assert scales["unit"] == pytest.approx(1, abs=1e-5) and 0.5 <= scales["paper"] < 0.7


def test_a_unit_gate_teaches_the_router_as_log_p_does():
    block = feed_forward_of(mixture("qwen2"))
    x = torch.randn(1, 4, 32)
    block(x).square().sum().backward()
    found, block.router.weight.grad = block.router.weight.grad, None
    logits, shares = block.router(x)
    top = shares.max(-1)
    with torch.no_grad():
        out = block(x)
    # y = p / stop(p) f: dL/dlog p = dL/dy . f, and y = f.
    (2 * out.square().sum(-1) * top.values.log()).sum().backward()
    assert error(found, block.router.weight.grad) < 1e-4
    assert (found.abs().sum(-1) > 0).all()  # of every expert: an expert not taken learns as well


def test_routers_keep_to_float32():
    model = mixture("llama").to(torch.bfloat16)
    router, x = attention_of(model).mix.router, torch.randn(1, 3, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, shares = router(x)
    assert logits.dtype == shares.dtype == torch.float32
    assert torch.equal(logits, x.float() @ router.weight.float().T)
    assert model(ids()).logits.dtype == torch.bfloat16
