"""What a method says that it keeps is what it ran: attention over the kept pairs is its output. From the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_plugins import registry
from attn_plugins.measured_call import dense_view
from attn_plugins.method import AttentionCall, CausalKeys
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.sequence import Sequence
from tests.support.matrix import SPARSE

CHOOSERS = [name for name in registry.method_names() if registry.method(name).kind == "sparse"]
# more than one setting of those that have several ways to choose
SETTINGS: list[tuple[str, dict[str, Any]]] = [(name, SPARSE.get(name, {})) for name in CHOOSERS if name in SPARSE] + [
    ("gna", {"window": (2, 3, 2), "stride": (2, 1, 1), "dilation": (1, 1, 2), "causal": (True, False, False)}),
    ("gna", {"window": 2, "stride": 1, "per_head": [{"heads": [1, 2], "window": 3}]}),
    ("vmoba", {"blocks": ((2, 2, 2), (-1, 2, 2), (2, 2, 2)), "exact": True, "k_blocks": 2}),
    ("vmoba", {"rule": "threshold", "scope": "head", "tau": 0.3, "tile": 3}),
    ("vmoba", {"rule": "threshold", "tau": 0.6, "exact": True, "max_blocks": 3}),
    ("radial", {"block": 4, "decay": 0.7}),
    ("draft", {"pool": (2, 3), "keep": 0.4}),
    ("sparge", {"block": 5, "tau": 0.5}),
]
ON_GRID = [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(SETTINGS)
           if registry.method(row[0]).sites & {"self", "joint"}]  # fmt: skip


def pairs(processor: Any, call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """(B or 1, H or 1, R, N_kv) bool."""
    kept = processor.kept(call, rows)
    seen = kept.chosen[..., kept.unit_of.clamp(min=0)] | (kept.unit_of < 0)
    return seen & dense_view(call, rows)[0]


def call_of(sequence: Sequence | None, batch: int, tokens: int, kind: Any, queries: int | None = None) -> AttentionCall:
    q, k, v = (torch.randn(batch, heads, tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    return AttentionCall(q[:, :, tokens - (queries or tokens) :], k, v, kind, sequence, causal=kind == "causal")


def processor_of(name: str, options: dict[str, Any], index: int = 0, kind: Any = "self") -> Any:
    method = registry.method(name)
    return method.processor(method.config_class.from_options(**options), index, 3, kind)


def assert_ran(processor: Any, call: AttentionCall) -> torch.Tensor:
    """The pairs of all rows, after a check that the output is attention over them."""
    out = processor(call)
    mask = pairs(processor, call, torch.arange(call.q.shape[2]))
    want = masked_attention(call.q, call.k, call.v, mask, call.q.shape[-1] ** -0.5)[0]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    return mask


@pytest.mark.parametrize(("name", "options"), ON_GRID)
@pytest.mark.parametrize("text", [(0, 0), (3, (2, 5))])
def test_on_a_grid(name, options, text):
    before, after = text
    length = 5 if after else 0
    sequence = Sequence((5, 4, 6), before, length, before and 2, after or None)
    for index in range(3):
        call = call_of(sequence, 2, sequence.length, "joint" if before else "self")
        mask = assert_ran(processor_of(name, options, index), call)
        grid = mask[:, :, before : before + 120, before : before + 120]
        assert not grid.all() and grid.any(-1).all()


@pytest.mark.parametrize(("name", "options"), ON_GRID)
def test_a_few_rows_are_rows_of_all(name, options):
    sequence = Sequence((5, 4, 6), 2, 3, 1, (3, 1))
    call = call_of(sequence, 2, sequence.length, "joint")
    processor = processor_of(name, options)
    rows = torch.tensor([0, 3, 77, 121, 124])
    assert torch.equal(pairs(processor, call, rows), pairs(processor, call, torch.arange(125))[:, :, rows])


def test_heads_of_one_device_keep_their_own_settings():
    processor = processor_of("gna", {"window": 2, "stride": 1, "per_head": [{"heads": [5], "window": 4}]})
    call = call_of(Sequence((9, 9)), 1, 81, "self")
    call.first_head, call.layer_heads = 4, 8
    mask = assert_ran(processor, call)
    assert mask[0].sum((-2, -1)).tolist() == [81 * 4, 81 * 16, 81 * 4, 81 * 4]


@pytest.mark.parametrize(
    ("name", "options"),
    [("gna", {"window": 7, "stride": 1}), ("gna", {"window": 6, "stride": 3, "dilation": 2}),
     ("moba", {"block": 8, "k_blocks": 2}), ("moba", {"block": 32, "k_blocks": 2}),
     ("moa", {"span": 9, "sink": 2, "block": 1}), ("moa", {"span": 0.5, "sink": 0, "block": 4})],
)  # fmt: skip
@pytest.mark.parametrize("queries", [50, 9, 1])
def test_causal_with_and_without_a_cache(name, options, queries):
    call = call_of(None, 2, 50, "causal", queries)
    assert_ran(processor_of(name, options, kind="causal"), call)


def test_causal_with_padded_prompts_and_a_sliding_window():
    call = call_of(None, 2, 20, "causal")
    starts = torch.tensor([0, 6])
    positions = torch.arange(20) - starts[:, None]
    call.keys = CausalKeys(positions.masked_fill(positions < 0, -1), -starts, torch.zeros(1, dtype=torch.int64))
    call.sliding_window = 4
    processor = processor_of("gna", {"window": 7, "stride": 1}, kind="causal")
    mask = pairs(processor, call, torch.arange(20))
    want = masked_attention(call.q, call.k, call.v, mask, 8**-0.5)[0]
    real = (positions >= 0)[:, None, :, None]
    torch.testing.assert_close(processor(call) * real, want * real, rtol=0, atol=1e-12)
    assert not mask[1, :, :6].any(), "a padding row sees nothing, so it is no sample"
    assert mask[0, 0].sum(-1).max() == 4 and mask[1, 0].sum(-1).tolist() == [0] * 6 + [1, 2, 3] + [4] * 11


def test_every_sparse_method_is_tested():
    assert set(CHOOSERS) <= {name for name, _ in SETTINGS} | {"moa", "moba"}
