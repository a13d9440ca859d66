"""Pooled keys and values: what stays exact, what text weighs, and the cost."""

import pytest
import torch
import yaml

from attn_plugins.method import AttentionCall
from attn_plugins.methods.kv_pool import KVPool, KVPoolConfig
from attn_plugins.ops.agent import pool_tokens
from attn_plugins.sequence import Sequence
from tests.methods.test_agent import GRIDS, call, softmax


def run(one, **options):
    return KVPool().processor(KVPoolConfig.from_options(**options), 0, 1)(one)


def dense(one):
    return torch.nn.functional.scaled_dot_product_attention(one.q, one.k, one.v, scale=one.scale, enable_gqa=True)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [{}, {"text_before": 7}, {"text_after": 5, "valid_after": (5, 2)}])
def test_it_is_attention_to_means_and_to_all_real_text(grid, text):
    one = call(Sequence(grid, **text), scale=0.4)
    to = tuple(-(-size // 2) for size in grid)
    want = torch.zeros_like(one.q)
    for b in range(2):
        item = one.sequence.item(b)
        first, last = item.text_before, item.text_before + item.tokens
        text_rows = [*range(item.valid_before), *range(last, last + item.valid_after)]
        rows = [*range(item.valid_before), *range(first, last), *range(last, last + item.valid_after)]
        k, v = (
            torch.cat([pool_tokens(t[b], grid, to, before=first), t[b, :, text_rows]], dim=1).repeat_interleave(
                2, dim=0
            )
            for t in (one.k, one.v)
        )
        want[b, :, rows] = softmax(one.q[b, :, rows], k, 0.4) @ v
    torch.testing.assert_close(run(one), want, rtol=0, atol=1e-12)


def flat(one, factor=2):
    """The call with keys and values that do not change within 2 x 2 tokens of its 6 x 6 grid."""
    parts = []
    for t in (one.k, one.v):
        means = pool_tokens(t, (6, 6), (3, 3), before=one.sequence.text_before).unflatten(2, (3, 3))
        t = t.clone()
        t[:, :, one.sequence.text_before :] = means.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2, 3)
        parts.append(t)
    return AttentionCall(one.q, *parts, "joint", one.sequence)


def test_keys_that_do_not_change_within_a_cell_lose_nothing():
    """Beside text only with the weights: four equal keys count as four."""
    one, joint = flat(call(Sequence((6, 6)))), flat(call(Sequence((6, 6), 5)))
    torch.testing.assert_close(run(one), dense(one), rtol=0, atol=1e-12)
    torch.testing.assert_close(run(one, log_weights=True), dense(one), rtol=0, atol=1e-12)
    torch.testing.assert_close(run(joint, log_weights=True), dense(joint), rtol=0, atol=1e-12)
    assert not torch.allclose(run(joint), dense(joint), atol=1e-3)


def test_a_factor_of_one_is_dense_attention():
    one = call(Sequence((5, 7), 3))
    torch.testing.assert_close(run(one, factor=1), dense(one), rtol=0, atol=1e-12)


def test_smooth_fields_lose_less_than_with_agents():
    from tests.methods.test_agent import run as run_agent

    grid = torch.stack(torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 24), indexing="ij"), dim=-1)
    waves = torch.randn(3, 2, 8, 2, dtype=torch.float64)
    fields = [torch.sin(6 * grid.double().flatten(0, 1) @ wave.transpose(-1, -2))[None] * 3 for wave in waves]
    one = AttentionCall(*fields, "self", Sequence((24, 24)))
    exact = dense(one)
    errors = [float((out - exact).norm() / exact.norm()) for out in (run(one), run_agent(one, agents=(12, 12)))]
    assert errors[0] < 0.5 * errors[1] and errors[0] < 0.1


def test_density_is_the_share_of_the_keys():
    processor = KVPool().processor(KVPoolConfig(), 0, 1)
    assert processor.density(Sequence((16, 16))) == 0.25
    assert processor.density(Sequence((5, 16, 16))) == 0.25  # time is not pooled
    assert processor.density(Sequence((16, 16), 10)) == (64 + 10) / 266
    assert processor.density(Sequence((5, 5))) == 9 / 25
    assert KVPool().processor(KVPoolConfig(factor=(2, 2, 2)), 0, 1).density(Sequence((4, 4, 4))) == 1 / 8


@pytest.mark.parametrize("config", [KVPoolConfig(), KVPoolConfig(factor=(1, 2, 2), log_weights=True)])
def test_options_round_trip_through_yaml(config):
    assert KVPoolConfig.from_options(**yaml.safe_load(yaml.safe_dump(config.to_options()))) == config


@pytest.mark.parametrize("factor", [0, 2.5, [2, 0], [1, 1, 1, 1], True])
def test_bad_factors_are_named(factor):
    with pytest.raises(ValueError, match="factor="):
        KVPoolConfig.from_options(factor=factor)


def test_what_it_refuses():
    processor = KVPool().processor(KVPoolConfig(), 0, 1)
    assert processor.refuses(call(Sequence((4, 4)))) is None
    for options in ({"causal": True}, {"dropout": 0.1}, {"mask": torch.ones(1, 1, 16, 16, dtype=torch.bool)}):
        assert processor.refuses(call(Sequence((4, 4)), **options))
    with pytest.raises(ValueError, match="is for 2 axes"):
        run(call(Sequence((3, 4, 4))), factor=(2, 2))
