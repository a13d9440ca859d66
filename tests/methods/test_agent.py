"""Agent attention as a method: its agents, text and padding, what it leaves dense, the published setting."""

import math
import warnings

import pytest
import torch
import yaml

from attn_plugins import presets, registry
from attn_plugins.method import AttentionCall
from attn_plugins.methods.agent import Agent, AgentConfig
from attn_plugins.ops.agent import pool_tokens
from attn_plugins.runtime import Layer, RootState
from attn_plugins.schedule import Schedule
from attn_plugins.sequence import Sequence
from tests.support.tolerance import within

GRIDS = [(24, 40), (25, 25), (33, 47)]  # latents that no cell divides


def call(sequence, batch=2, dtype=torch.float64, heads=(4, 2), dim=8, **options):
    q, k, v = (torch.randn(batch, count, sequence.length, dim, dtype=dtype) for count in (heads[0], *heads[1:] * 2))
    return AttentionCall(q, k, v, kind="joint", sequence=sequence, **options)


def run(one, **options):
    return Agent().processor(AgentConfig.from_options(**options), 0, 1)(one)


def softmax(q, k, scale):
    return (scale * q @ k.transpose(-1, -2)).softmax(-1)


def by_hand(one, to, power=0.15, shortcut=0.075):
    """The formula, an item at a time, on what is real of it, in the dtype that `one` has."""
    out = torch.zeros_like(one.q)
    dim = one.q.shape[-1]
    scale = dim**-0.5 if one.scale is None else one.scale
    for b in range(one.q.shape[0]):
        item = one.sequence.item(b)
        first, last = item.text_before, item.text_before + item.tokens
        grid, text = torch.arange(first, last), torch.arange(item.length)
        text = text[(text < item.valid_before) | ((text >= last) & (text < last + item.valid_after))]
        real = torch.cat([text[text < first], grid, text[text >= last]])
        k, v = (t[b].repeat_interleave(one.q.shape[1] // t.shape[1], dim=0) for t in (one.k, one.v))
        agents = pool_tokens(one.q[b], item.grid, to, before=first)
        gathered = softmax(agents, k[:, real], scale) @ v[:, real]
        second = scale * dim ** (0.5 - power)
        out[b, :, grid] = softmax(one.q[b, :, grid], agents, second) @ gathered + shortcut * v[:, grid]
        out[b, :, text] = softmax(one.q[b, :, text], k[:, real], scale) @ v[:, real]
    return out


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [{}, {"text_before": 7}, {"text_after": 5, "valid_after": (5, 2)}])
def test_it_is_the_formula_with_exact_text(grid, text):
    one = call(Sequence(grid, **text))
    to = AgentConfig().grid(grid)
    assert math.prod(to) == pytest.approx(math.prod(grid) / 16, rel=0.1)
    torch.testing.assert_close(run(one), by_hand(one, to), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_as_precise_as_plain_attention_twice(dtype):
    """Against float64, at most twice the error of the same formula by PyTorch's own attention in that precision."""
    one = call(Sequence((25, 25), 6, 0, (6, 3)), dtype=dtype, heads=(2, 2), dim=32)
    agents = pool_tokens(one.q, (25, 25), (6, 6), before=6)
    theirs = torch.zeros_like(one.q)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for b, valid in enumerate((6, 3)):
        real = torch.cat([torch.arange(valid), torch.arange(6, 631)])
        k, v = one.k[b : b + 1, :, real], one.v[b : b + 1, :, real]
        gathered = sdpa(agents[b : b + 1], k, v)
        theirs[b, :, 6:] = sdpa(one.q[b : b + 1, :, 6:], agents[b : b + 1], gathered, scale=32**-0.15)[0]
        theirs[b, :, 6:] += 0.075 * one.v[b, :, 6:]
        theirs[b, :, :valid] = sdpa(one.q[b : b + 1, :, :valid], k, v)[0]
    wide = AttentionCall(one.q.double(), one.k.double(), one.v.double(), "joint", one.sequence)
    assert within(run(one, agents=(6, 6)), theirs, by_hand(wide, (6, 6)))


def test_equal_queries_get_exact_attention_whatever_the_number_of_agents():
    one = call(Sequence((6, 6)), heads=(2, 2))
    one.q = one.q[:, :, :1].expand_as(one.q).contiguous()
    exact = torch.nn.functional.scaled_dot_product_attention(one.q, one.k, one.v)
    for agents in (1, 4, 9):
        torch.testing.assert_close(run(one, agents=agents, shortcut=0.0), exact, rtol=0, atol=1e-12)


def test_constant_values_stay_and_one_agent_makes_rows_equal():
    one = call(Sequence((6, 6)), heads=(2, 2))
    flat = run(one, agents=1, shortcut=0.0)
    torch.testing.assert_close(flat, flat[:, :, :1].expand_as(flat), rtol=0, atol=1e-12)
    one.v = torch.full_like(one.v, 3.0)
    torch.testing.assert_close(run(one), torch.full_like(one.q, 3.0 * 1.075), rtol=0, atol=1e-12)


def test_the_order_of_text_does_not_matter_to_the_grid():
    one = call(Sequence((6, 6), 5))
    mixed = AttentionCall(
        one.q, *(t[:, :, [4, 2, 0, 1, 3, *range(5, 41)]] for t in (one.k, one.v)), "joint", one.sequence
    )
    torch.testing.assert_close(run(mixed)[:, :, 5:], run(one)[:, :, 5:], rtol=0, atol=1e-12)


def test_it_draws_no_random_numbers_and_repeats_itself():
    one = call(Sequence((9, 7), 3))
    state = torch.random.get_rng_state()
    assert torch.equal(run(one), run(one))
    assert torch.equal(torch.random.get_rng_state(), state)


def attend(tokens, min_tokens=(512, 2048), **options):
    """What a patched layer answers to a call of that many tokens: its output, or None (it stays dense)."""
    state = RootState(Schedule(), min_tokens=min_tokens)
    layer = Layer(state, Agent().processor(AgentConfig.from_options(**options), 0, 1), "self", "layer", 0)
    return layer.attend(call(Sequence((tokens,)), batch=1))


def test_short_grids_and_many_agents_stay_dense():
    assert attend(511) is None and attend(512) is not None
    state = RootState(Schedule(), min_tokens=Agent.min_tokens)
    assert [state.least_tokens(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [512, 2048, 2048]
    with pytest.warns(UserWarning, match="512 agents for 1024 tokens cost no less"):
        assert attend(1024, ratio=0.5) is None
    assert attend(1024, ratio=0.49) is not None
    with pytest.warns(UserWarning, match="attention mask"):
        state = RootState(Schedule())
        layer = Layer(state, Agent().processor(AgentConfig(), 0, 1), "self", "layer", 0)
        masked = call(Sequence((64,)), mask=torch.ones(1, 1, 64, 64, dtype=torch.bool))
        assert layer.attend(masked) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.attend(masked) is None  # said once


@pytest.mark.parametrize("bad", [(1,), (1, 2, 3), (-1, 2), 2.5, True])
def test_a_bad_minimum_is_named(bad):
    with pytest.raises(ValueError, match="min_tokens="):
        RootState(Schedule(), min_tokens=bad)


def test_density_is_the_share_of_the_cost():
    processor = Agent().processor(AgentConfig(agents=(4, 4)), 0, 1)
    assert processor.density(Sequence((16, 16))) == 2 * 16 / 256
    assert processor.density(Sequence((16, 16), 10)) == (16 * (266 + 256) + 10 * 266) / 266**2
    padded = (16 * (261 + 256) + 5 * 261) / 266**2
    assert processor.density(Sequence((16, 16), 10, 0, (5, 5))) == pytest.approx(padded)
    assert processor.density(Sequence((5, 5))) == 1.0  # as many as half: dense
    assert processor.measure == "cost"


def test_published_preset():
    row = next(row for row in presets.available("agent") if row.name == "sd15")
    setting, config = row.at("balanced"), AgentConfig.from_options(**row.at("balanced").options)
    assert setting.evidence == "published" and config.grid((64, 64)) == (16, 16)
    assert (config.power, config.shortcut) == (0.15, 0.075)
    schedule = Schedule(setting.dense_steps)
    assert [step for step in range(50) if not schedule.is_dense(step, 50)] == list(range(20))


@pytest.mark.parametrize("method", ["agent", "kv_pool"])
def test_presets_are_in_order(method):
    for row in presets.available(method):
        costs = []
        for quality in presets.QUALITIES:
            preset = row.at(quality)
            config = registry.method(method).config_class.from_options(**preset.options)
            processor = registry.method(method).processor(config, 0, 1, "self")
            share = Schedule(preset.dense_steps).dense_share
            costs.append(share + (1 - share) * processor.density(Sequence((64, 64))))
        assert costs[0] > costs[1] > costs[2] > 0


@pytest.mark.parametrize(
    "config", [AgentConfig(), AgentConfig(agents=(4, 8)), AgentConfig(ratio=0.1, power=0.5, shortcut=0.0)]
)
def test_options_round_trip_through_yaml(config):
    assert AgentConfig.from_options(**yaml.safe_load(yaml.safe_dump(config.to_options()))) == config


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"agents": 0}, "agents=0"),
        ({"agents": [4, 0]}, "agents="),
        ({"agents": 2.5}, "agents=2.5"),
        ({"backend": "gpu"}, "backend='gpu'"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        run(call(Sequence((6, 6))), **options)


def test_agents_of_other_axes_are_an_error():
    with pytest.raises(ValueError, match=r"agents=\(4, 4\) are of 2 axes"):
        run(call(Sequence((3, 6, 6))), agents=(4, 4))
