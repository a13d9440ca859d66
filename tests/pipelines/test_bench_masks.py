"""The masks of the benchmark: intervals, rules, areas, block tables and plans all say the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_plugins.pipelines.benching import documents, flops
from attn_plugins.pipelines.benching.backends import flex
from attn_plugins.pipelines.benching.masks import MASKS, Shape, grids, named
from attn_plugins.pipelines.benching.masks.blocks import BlockMask
from attn_plugins.pipelines.benching.masks.rows import RowMask, Rows
from attn_plugins.pipelines.benching.plans import interval_plan
from attn_plugins.pipelines.benching.sides import Cannot, Setting

CPU = Setting(torch.float32, 16, torch.device("cpu"), tiny=True)
LISTED = [
    "full", "causal", "document", "causal_document", "sliding", "causal_sliding", "share_question", "causal_blockwise",
    "prefix_lm_causal", "prefix_lm_document", "global_sliding", "block_causal_document", "block_sparse",
    "variable_block_sparse", "gna_aligned", "gna", "vmoba", "moa_spans", "agent", "moh",
]  # fmt: skip
PLAIN = [name for name in LISTED if name not in ("agent", "moh")]
TEXTS = LISTED[:12]


def made(name, tokens=320, heads=4, kv_heads=2):
    """The mask, and its definition (H, N, N) by the rule alone."""
    mask = MASKS[name].make(Shape(tokens, heads, kv_heads))
    mask = mask.resolved(mask.leaves(CPU))
    return mask, mask.rows(torch.arange(heads), torch.arange(tokens))


def by_pairs(name, n):
    """Masks pair by pair, from their descriptions, at lengths where every edge matters."""
    lengths = documents.packed_lengths(n)
    of = [number for number, length in enumerate(lengths) for _ in range(length)]
    start = [sum(lengths[:number]) for number in of]
    window, held, prefix = max(n // 8, 2), max(n // 64, 1), max(n // 4, 1)
    rules = {
        "full": lambda i, j: True,
        "causal": lambda i, j: j <= i,
        "document": lambda i, j: of[i] == of[j],
        "causal_document": lambda i, j: of[i] == of[j] and j <= i,
        "sliding": lambda i, j: abs(i - j) <= window // 2,
        "causal_sliding": lambda i, j: 0 <= i - j < window,
        "share_question": lambda i, j: j <= i and (of[i] == of[j] or of[j] == 0),
        "causal_blockwise": lambda i, j: j <= i and (of[i] == of[j] or of[i] == len(lengths) - 1),
        "prefix_lm_causal": lambda i, j: j <= i or max(i, j) < prefix,
        "prefix_lm_document": lambda i, j: of[i] == of[j] and (j <= i or j - start[j] < lengths[of[j]] // 2),
        "global_sliding": lambda i, j: i < held or j < held or abs(i - j) <= max(n // 16, 1),
    }
    return torch.tensor([[rules[name](i, j) for j in range(n)] for i in range(n)])


def test_every_mask_has_a_name():
    assert list(MASKS) == LISTED and named([]) == LISTED and named(["gna"]) == ["gna"]
    with pytest.raises(ValueError, match="'casual': legal are full, causal, "):
        named(["casual"])


@pytest.mark.parametrize("n", [1, 2, 67, 200])
@pytest.mark.parametrize("name", [name for name in TEXTS if name != "block_causal_document"])
def test_the_rule_is_its_description(name, n):
    assert torch.equal(made(name, n)[1][0], by_pairs(name, n))


def test_documents_that_are_causal_by_blocks():
    mask, seen = made("block_causal_document", 256)  # blocks of 8 tokens, documents of 1, 6, 3, 8, 5, 2, 7 blocks
    ends = [0, 8, 56, 80, 144, 184, 200, 256]
    assert mask.option.startswith("7 documents of blocks of 8")
    for i in range(256):
        start = max(end for end in ends if end <= i)
        assert torch.nonzero(seen[0, i]).flatten().tolist() == list(range(start, i // 8 * 8 + 8))


@pytest.mark.parametrize("name", PLAIN)
def test_the_area_is_exact(name):
    for tokens in (320, 192):
        mask, seen = made(name, tokens)
        assert mask.pairs == seen.sum((1, 2), dtype=torch.float64).mean().item()
        assert mask.density == mask.pairs / tokens**2
        assert not mask.causal or not bool(seen.triu(1).any())
    if name == "vmoba":  # known before q and k are
        assert MASKS[name].make(Shape(192, 4, 2)).pairs == mask.pairs


@pytest.mark.parametrize("name", [*TEXTS, "moa_spans"])
def test_intervals_and_rule_agree(name):
    for n in (1, 33, 301):
        mask, seen = made(name, n)
        assert isinstance(mask, RowMask)
        rows, key = mask.intervals, torch.arange(n)
        lead, low, high = (t[..., None] for t in (rows.lead, rows.low, rows.high))
        assert torch.equal(((key < lead) | ((low <= key) & (key < high))).expand_as(seen), seen)


def test_operations_are_of_pairs():
    shape = Shape(100, heads=3, kv_heads=1, batch=2)
    assert flops.gflop(50.0, shape, 8, "fwd") == pytest.approx(4e-9 * 8 * 50 * 6)
    assert flops.gflop(50.0, shape, 8, "bwd") == pytest.approx(2.5 * flops.gflop(50.0, shape, 8, "fwd"))
    assert flops.gflop(50.0, shape, 8, "fwd+bwd") == pytest.approx(3.5 * flops.gflop(50.0, shape, 8, "fwd"))
    assert flops.gflop(-1.0, shape, 8, "fwd") == -1.0


@pytest.mark.parametrize("name", [*TEXTS, "moa_spans"])
def test_block_tables_are_those_of_the_mask(name):
    mask, seen = made(name, 300)
    starts = torch.arange(0, 300, flex.BLOCK)
    found = mask.intervals.tables(starts, (starts + flex.BLOCK).clamp(max=300), torch.arange(300) // flex.BLOCK, 3)
    for head in range(mask.intervals.heads):
        expected = flex.block_tables(lambda i, j, h=head: seen[h, i, j], torch.arange(300))
        assert torch.equal(found[0][head], expected[0][0]) and torch.equal(found[1][head], expected[1][0])


@pytest.mark.parametrize("tiles", [(64, 32), (17, 5), (512, 512)], ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_the_plan_is_the_mask(name, tiles):
    mask, seen = made(name, 301)
    plan = interval_plan(mask.intervals, mask.edges, *tiles)
    assert torch.equal(plan.to_mask()[0, 0], seen[0]) and int(plan.q_size.max()) <= tiles[0]
    assert mask.density <= plan.density <= 1
    if plan.rule is not None:  # for kernels: where a block is under a mask, one run of keys is the whole of it
        inside = plan.rule.intervals(plan).to_mask()
        for row in torch.nonzero(plan.full[0, 0] < plan.count[0, 0])[:, 0].tolist():
            blocks = plan.lists[0, 0, row, plan.full[0, 0, row] : plan.count[0, 0, row]].long()
            q = torch.arange(int(plan.q_start[row]), int(plan.q_start[row] + plan.q_size[row]))
            for block in blocks.tolist():
                kv = slice(int(plan.kv_start[block]), int(plan.kv_start[block] + plan.kv_size[block]))
                assert torch.equal(inside[q, kv], seen[0, q, kv])


def test_query_blocks_of_one_pattern_have_one_mask():
    """Else the CPU backend would run one block under another's mask."""
    for name in TEXTS:
        mask, _ = made(name, 301)
        plan = interval_plan(mask.intervals, mask.edges, 32, 16)
        masks = {}
        for row in getattr(plan.rule, "patterns", {}):
            keys, one = plan.rule.row(plan, row, 0, 0)
            key = (one.shape, plan.rule.pattern(row, 0, 0), int(plan.full[0, 0, row]))
            assert torch.equal(masks.setdefault(key, one), one), (name, row)


def test_rows_that_see_nothing_are_known():
    empty = torch.zeros(1, 8, dtype=torch.int64)
    rows = Rows(empty, empty + 5, torch.tensor([[0, 0, 6, 8, 8, 8, 8, 8]]))
    plan = interval_plan(rows, (), 4, 4)
    assert plan.rule.empty_rows and not bool(plan.to_mask()[0, 0, :2].any())
    assert rows.area.tolist() == [1 + 5 * 3]


@pytest.mark.parametrize("name", ["block_sparse", "variable_block_sparse", "vmoba"])
def test_block_plans_are_the_mask(name):
    mask, seen = made(name)
    assert isinstance(mask, BlockMask) and mask.by_head
    plan = mask.plan(CPU, ())
    assert torch.equal(plan.to_mask()[0], seen) and plan.density == pytest.approx(mask.density)
    assert bool(seen.diagonal(dim1=1, dim2=2).all())


def test_grids():
    assert grids.grid_of(8192) == (16, 16, 32) and grids.grid_of(2048, axes=2) == (32, 64)
    with pytest.raises(Cannot, match="509 tokens are no grid"):
        grids.grid_of(509)
    with pytest.raises(Cannot, match="no grid"):
        MASKS["gna"].make(Shape(509))


def test_agents_need_as_many_kv_heads():
    with pytest.raises(Cannot, match="4 heads on 2"):
        MASKS["agent"].make(Shape(256, 4, 2))


def test_documents_fill_the_sequence_and_are_always_the_same():
    for tokens in (1, 3, 64, 2048, 65536):
        lengths = documents.packed_lengths(tokens)
        assert sum(lengths) == tokens and min(lengths) > 0 and max(lengths) <= max(tokens // 4, 1)
        assert lengths == documents.packed_lengths(tokens)
    assert documents.packed_lengths(2048) != documents.packed_lengths(2048, seed=1)
    with pytest.raises(ValueError, match="0 tokens"):
        documents.packed_lengths(0)


def test_the_histogram_counts_by_powers_of_two():
    assert documents.count_lengths(["a b c", "", "a", "b"], lambda text: len(text.split())) == {1: 2, 2: 1}
    module = "import os\n\n@one\n@two\ndef f():\n    pass\n\n\nclass C:\n    x = 1\n"
    found = list(documents.pieces([("m", module), ("pydoc_data.topics.x", "a topic")]))
    assert found == ["@one\n@two\ndef f():\n    pass\n", "class C:\n    x = 1\n", "a topic"]


def test_the_histograms_are_of_this_text():
    """A part of the text, counted anew: each bin has at least what the part has; nothing is outside of the bins."""
    from itertools import islice

    tokenizers = pytest.importorskip("tokenizers")
    from attn_plugins.pipelines.small_llama import asset_folder
    from attn_plugins.training.small_llama.corpus import documents as texts

    encode = tokenizers.Tokenizer.from_file(str(asset_folder() / "tokenizer.json")).encode
    some = list(islice((row for row in texts() if len(row[1]) < 20000), 0, 60, 10))
    parts = ((documents.MODULES, (text for _, text in some)), (documents.PIECES, documents.pieces(some)))
    for histogram, found in parts:
        counted = documents.count_lengths(found, lambda text: len(encode(text, add_special_tokens=False).ids))
        assert sum(counted.values()) >= 3
        assert all(count <= histogram[least] for least, count in counted.items())


def test_a_shape_is_what_the_problem_has():
    shape = Shape(96, 4, 2, batch=2)
    q, k, v = MASKS["causal"].make(shape).leaves(dataclasses.replace(CPU, head_dim=8))
    assert q.shape == (2, 4, 96, 8) and k.shape == v.shape == (2, 2, 96, 8)
