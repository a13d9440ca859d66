"""Heads of one setting go together, wherever they stand, and runs of equal items too."""

import itertools

import pytest
import torch

from attn_plugins.ops.heads import attend_by_head, equal_runs, kv_heads_of


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("settings", list(itertools.product("ab", repeat=4)), ids="".join)
def test_each_head_gets_its_own_setting_and_kv_head(settings, kv_heads):
    q = torch.randn(2, 3, 4, 5).transpose(1, 2)  # (B, H, N, D), a layout that must stay
    k, v = torch.randn(2, 2, kv_heads, 6, 5)
    asked = []

    def attend(q, k, v, setting):
        asked.append(setting)
        size = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(size, 1) for t in (k, v))
        return q + k.sum(2, keepdim=True) * (setting == "a") + v.sum(2, keepdim=True), q.sum(-1) + ord(setting)

    out, lse = attend_by_head(q, k, v, settings, attend)
    for head, setting in enumerate(settings):
        kv = slice(head * kv_heads // 4, head * kv_heads // 4 + 1)
        one, one_lse = attend(q[:, head : head + 1], k[:, kv], v[:, kv], setting)
        assert torch.equal(out[:, head : head + 1], one) and torch.equal(lse[:, head : head + 1], one_lse)
    assert out.stride() == q.stride() or len(set(settings)) == 1
    assert asked[: -len(settings)] == list(dict.fromkeys(settings))


@pytest.mark.parametrize(
    ("heads", "expected"),
    [([0, 1, 2, 3], [0, 1]), ([2, 3], [1]), ([2, 3, 0, 1], [1, 0]), ([0, 2], [0, 1]), ([0, 1, 2], [0, 0, 1])],
    ids=str,
)
def test_whole_groups_keep_one_kv_head(heads, expected):
    """Two query heads share one: parts of a group read it once for each of their heads."""
    assert kv_heads_of(heads, 4, 2) == expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("", []),
        ("a", [(slice(None), "a")]),
        ("aaa", [(slice(None), "a")]),
        ("aab", [(slice(0, 2), "a"), (slice(2, 3), "b")]),
        ("aba", [(slice(0, 1), "a"), (slice(1, 2), "b"), (slice(2, 3), "a")]),
    ],
)
def test_runs_of_equal_items(items, expected):
    assert equal_runs(items) == expected
