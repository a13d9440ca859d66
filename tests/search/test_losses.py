"""The loss of a window is the sum of the blocks that it hides, counted one by one."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.search import grouped, hidden_loss


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_prefix_sums_are_the_sums(sink):
    maps = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    spans = [0, 1, 4, 8, 9, 20]
    found = hidden_loss(maps, spans, sink=sink)
    for place, span in enumerate(spans):
        hidden = [(a, b) for a in range(9) for b in range(a + 1) if not (b < sink or a - b < span)]
        expected = sum((maps[..., a, b] for a, b in hidden), torch.zeros(2, 3, dtype=torch.float64))
        torch.testing.assert_close(found[..., place], expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(found[..., 4:], torch.zeros(2, 3, 2, dtype=torch.float64))


def test_wider_windows_never_lose_more():
    found = hidden_loss(torch.rand(4, 16, 16), range(17))
    assert bool((found.diff(dim=-1) <= 0).all()) and float(found[:, 0].min()) > 0


def test_members_of_a_group_add_up():
    members = torch.arange(24.0).view(2, 6, 2)
    found = grouped(members, 3, dim=1)
    assert found.tolist() == [[[2, 4], [10, 12], [18, 20]], [[26, 28], [34, 36], [42, 44]]]
    assert torch.equal(grouped(members, 3, dim=-2), found)
    with pytest.raises(ValueError, match="6 members in 4 groups"):
        grouped(members, 4, dim=1)


def test_what_is_no_map_is_named():
    with pytest.raises(ValueError, match=r"maps \(2, 3\)"):
        hidden_loss(torch.rand(2, 3), [1])
    with pytest.raises(ValueError, match="spans="):
        hidden_loss(torch.rand(3, 3), [-1])
