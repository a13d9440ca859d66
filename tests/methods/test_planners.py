"""The methods that are other planners on the same operators: radial, draft and sparge, each against its definition."""

import math

import pytest
import torch

from attn_plugins import presets, registry
from attn_plugins.method import AttentionCall
from attn_plugins.methods.draft import Draft, DraftConfig
from attn_plugins.methods.radial import Radial, RadialConfig, radial_blocks, radial_plan
from attn_plugins.methods.sparge import Sparge, SpargeConfig
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.sequence import Sequence


def call(sequence, batch=2):
    q, k, v = (torch.randn(batch, heads, sequence.length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    return AttentionCall(q, k, v, kind="self", sequence=sequence)


def radial_pairs(frames, tokens):
    """The mask of arXiv 2506.19852, pair by pair."""

    def sees(a, b):
        (i, k), (j, m) = divmod(a, tokens), divmod(b, tokens)
        power = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
        near = power <= tokens and abs(k - m) + 1 <= tokens / power
        return near or (abs(i - j) % math.ceil(power / tokens) == 0 and k == m)

    cells = range(frames * tokens)
    return torch.tensor([[sees(a, b) for b in cells] for a in cells])


@pytest.mark.parametrize(("frames", "tokens"), [(9, 6), (20, 3), (5, 7), (33, 1)])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_radial_is_the_published_mask_in_blocks(frames, tokens, block):
    pairs = radial_pairs(frames, tokens)
    found = radial_blocks(frames, tokens, RadialConfig(block=block, sink=False))
    per_frame = -(-tokens // block)
    block_of = torch.tensor([t // tokens * per_frame + t % tokens // block for t in range(frames * tokens)])
    seen = torch.zeros_like(found)
    a, b = pairs.nonzero(as_tuple=True)
    seen[block_of[a], block_of[b]] = True
    assert torch.equal(found, seen)
    with_sink = radial_blocks(frames, tokens, RadialConfig(block=block))
    assert with_sink[:, :per_frame].all() and torch.equal(with_sink[:, per_frame:], found[:, per_frame:])


@pytest.mark.parametrize("text", [(0, 0), (3, (1, 2))])
def test_radial_attends_its_plan(text):
    sequence = Sequence((6, 3, 4), 2 if text[0] else 0, text[0], None, text[1] if text[0] else None)
    config = RadialConfig(block=5, decay=0.5, sink=False)
    one = call(sequence)
    found = Radial().processor(config, 0, 1)(one)
    masks = [radial_plan(sequence.item(b), config).to_mask()[0] for b in range(2)]
    want = masked_attention(one.q, one.k, one.v, torch.stack(masks), 8**-0.5)[0]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    first = sequence.text_before
    grid = masks[0][0, first : first + 72, first : first + 72]
    assert torch.equal(grid[::12, ::12], radial_blocks(6, 12, config)[::3, ::3]) and not grid.all()


def test_radial_thins_out_with_time():
    shares = [Radial().processor(RadialConfig(), 0, 1).density(Sequence((frames, 30, 52))) for frames in (5, 21, 41)]
    assert 1 > shares[0] > shares[1] > shares[2] > 0.3


def test_radial_of_few_frames_and_wide_windows_is_dense_attention():
    one = call(Sequence((8, 3, 4), 0, 2))
    found = Radial().processor(RadialConfig(decay=100), 0, 1)(one)
    want = masked_attention(one.q, one.k, one.v, torch.ones(1, 1, 98, 98, dtype=torch.bool), 8**-0.5)[0]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_radial_on_one_axis_thins_out_tokens():
    found = radial_plan(Sequence((20,)), RadialConfig(sink=False)).to_mask()[0, 0]
    assert torch.equal(found, radial_pairs(20, 1))


def test_draft_keeps_the_best_of_the_map_and_the_own_block():
    one = call(Sequence((2, 4, 6)))
    found = Draft().processor(DraftConfig(pool=(2, 3), keep=0.375), 0, 1)(one)
    cells = [(t, y // 2, x // 3) for t in range(2) for y in range(4) for x in range(6)]
    tiles = sorted(set(cells))
    member = torch.tensor([[float(cell == tile) for cell in cells] for tile in tiles], dtype=torch.float64)
    k, v = (t.repeat_interleave(2, dim=1) for t in (one.k, one.v))
    draft = (member @ one.q / 6) @ (member @ k / 6).transpose(-1, -2)
    own = torch.eye(8, dtype=torch.bool)
    best = draft.masked_fill(own, float("-inf")).flatten(2).topk(2 * 8).indices  # 3 of 8 a tile, one of them its own
    kept = torch.zeros(2, 4, 64, dtype=torch.bool).scatter_(-1, best, True).view(2, 4, 8, 8) | own
    mask = (member.T @ kept.double() @ member).bool()
    torch.testing.assert_close(found, masked_attention(one.q, k, v, mask, 8**-0.5)[0], rtol=0, atol=1e-12)


def test_sparge_keeps_the_top_of_the_softmax():
    one = call(Sequence((24,)))
    found = Sparge().processor(SpargeConfig(block=4, tau=0.7), 0, 1)(one)
    k, v = (t.repeat_interleave(2, dim=1) for t in (one.k, one.v))
    pooled = [t.unflatten(2, (6, 4)).mean(3) for t in (one.q, k)]
    weights = torch.softmax(pooled[0] @ pooled[1].transpose(-1, -2) * 8**-0.5, -1)
    mask = torch.zeros(2, 4, 6, 6, dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(6)).tolist():
        row, kept = weights[b, h, r], [r]
        for j in sorted((j for j in range(6) if j != r), key=lambda j: -row[j]):
            if row[kept].sum() >= 0.7:
                break
            kept.append(j)
        mask[b, h, r, kept] = True
    mask = mask.repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(found, masked_attention(one.q, k, v, mask, 8**-0.5)[0], rtol=0, atol=1e-12)
    assert 0.2 < mask.double().mean() < 0.9


@pytest.mark.parametrize("name", ["draft", "radial", "sparge", "moba"])
def test_presets_are_options_that_round_trip(name):
    method = registry.method(name)
    rows = presets.available(name)
    assert rows
    for row in rows:
        for quality in presets.QUALITIES:
            config = method.config_class.from_options(**row.at(quality).options)
            assert method.config_class.from_options(**config.to_options()) == config


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (DraftConfig, {"pool": (8,)}, "pool="),
        (DraftConfig, {"keep": 0.0}, "keep=0.0"),
        (DraftConfig, {"scope": "all"}, "scope='all'"),
        (DraftConfig, {"max_blocks": 0}, "max_blocks=0"),
        (SpargeConfig, {"block": 0}, "block=0"),
        (SpargeConfig, {"tau": -0.1}, "tau=-0.1"),
        (RadialConfig, {"block": 0}, "block=0"),
        (RadialConfig, {"decay": 0}, "decay=0"),
    ],
)
def test_bad_options_are_named(config, options, named):
    with pytest.raises(ValueError, match=named):
        config.from_options(**options)
