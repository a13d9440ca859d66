"""Dice and confusion of attention maps: by hand, at their ends, and as a loss."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.metrics import confusion_matrix, confusion_score, dice, dice_loss

HALVES = torch.zeros(2, 4, 6)
HALVES[0, :, :3] = HALVES[1, :, 3:] = 1


def test_by_hand() -> None:
    maps = torch.tensor([[[[0.5, 0.25], [0.0, 1.0]], [[0.0, 0.75], [0.5, 0.0]]]])
    masks = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 0.5]]])
    found = dice(maps, masks)
    assert torch.allclose(found, torch.tensor([[2 * 0.5 / (1.75 + 2), 2 * 0.75 / (1.25 + 1.5)]]))
    assert torch.allclose(dice(maps, masks, smooth=1.0)[0, 0], torch.tensor(2.0 / 4.75))
    own, other = 0.5, 0.25 + 0.5
    assert torch.allclose(confusion_matrix(maps, masks)[0, 0], torch.tensor([own, other]) / 1.25)
    assert torch.allclose(confusion_score(maps, masks), torch.tensor([(other / 1.25 + 0.5 / 1.25) / 2]))


@pytest.mark.parametrize("frames", [(), (3,)])
def test_the_ends(frames: tuple[int, ...]) -> None:
    masks = HALVES[:, None].expand(2, *frames, 4, 6) if frames else HALVES
    right = masks[None].double()
    assert torch.equal(dice(right, masks), torch.ones(1, 2).double())
    assert torch.equal(confusion_score(right, masks), torch.zeros(1).double())
    assert torch.equal(confusion_score(right.flip(1), masks), torch.ones(1).double())
    assert torch.equal(dice(right.flip(1), masks), torch.zeros(1, 2).double())
    assert torch.allclose(confusion_score(torch.ones_like(right), masks), torch.tensor([0.5]).double())
    nowhere = torch.zeros_like(right)
    assert torch.equal(dice(nowhere, 0 * masks), torch.zeros(1, 2).double())
    assert torch.equal(confusion_score(nowhere, masks), torch.zeros(1).double())


def test_masks_of_another_size_are_brought_to_the_maps() -> None:
    maps = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    fine = torch.rand(2, 8, 6, generator=torch.Generator().manual_seed(1))
    coarse = torch.stack([torch.stack([row[:, :3].mean(1), row[:, 3:].mean(1)], 1) for row in fine.unflatten(1, (2, 4))
                          .mean(2)])  # fmt: skip
    assert torch.allclose(dice(maps, fine), dice(maps, coarse))
    each = torch.stack([fine, fine.flip(0)])
    assert torch.allclose(dice(maps, each)[1], dice(maps[1:], fine.flip(0))[0])


def test_as_a_loss_it_moves_maps_into_their_masks() -> None:
    logits = torch.zeros(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dice_loss(torch.sigmoid(x), HALVES), (logits + 0.1,))
    optimizer = torch.optim.SGD([logits], lr=20.0)
    before = confusion_score(torch.sigmoid(logits).detach(), HALVES)
    for _ in range(200):
        loss = dice_loss(torch.sigmoid(logits), HALVES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert confusion_score(torch.sigmoid(logits).detach(), HALVES) < 0.1 * before
    assert torch.equal(dice_loss(HALVES[None], HALVES), torch.tensor(0.0))
    assert dice_loss(torch.zeros(1, 2, 4, 6, requires_grad=True), HALVES).isfinite()


def test_half_precision_is_summed_in_float32() -> None:
    maps = torch.rand(
        1, 2, 128, 128, generator=torch.Generator().manual_seed(0)
    ).half()  # sums to 8,192: fp16 has 11 bits
    assert torch.allclose(dice(maps, HALVES), dice(maps.double(), HALVES).float(), atol=1e-6)


@pytest.mark.parametrize(
    ("maps", "masks", "why"),
    [
        (torch.ones(2, 4, 6), HALVES, "give"),
        (torch.ones(1, 3, 4, 6), HALVES, r"masks \(1, 2, 4, 6\) for maps \(1, 3, 4, 6\)"),
        (torch.ones(1, 2, 4, 6), HALVES[None, None], "masks"),
        (torch.ones(3, 2, 4, 6), HALVES[None].expand(2, -1, -1, -1), "masks"),
        (torch.ones(1, 2, 0, 6), HALVES, "give"),
    ],
)
def test_what_does_not_fit_is_said(maps: torch.Tensor, masks: torch.Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        dice(maps, masks)


def test_one_subject_confuses_nothing() -> None:
    with pytest.raises(ValueError, match="two subjects or more"):
        confusion_score(torch.ones(1, 1, 4, 6), HALVES[:1])
