"""Where regions are: boxes and masks on grids, shares and ids; and what is wrong with one, said in a line."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from attn_plugins.methods.regions import Region, RegionLayout, RegionsConfig
from attn_plugins.methods.regions.areas import area_of

BOX = (0.0, 0.0, 0.5, 1.0)
MASK = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))


def layout(*areas: Any, weights: Any = None, base: float = 0.0) -> RegionLayout:
    return RegionLayout([area_of(area) for area in areas], weights or [1.0] * len(areas), base)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 9), (1, 1), (24, 40)])
def test_a_box_is_the_mask_of_its_pixels(grid: tuple[int, ...]) -> None:
    pixels = torch.zeros(30, 40)
    pixels[6:21, 10:32] = 1
    box = area_of((10 / 40, 6 / 30, 32 / 40, 21 / 30))
    torch.testing.assert_close(box.on(grid), area_of(pixels).on(grid))
    assert torch.equal(box.on((2, *grid)), box.on(grid).repeat(2))


def test_a_mask_is_averaged_over_areas() -> None:
    expected = MASK.double().unflatten(1, (5, 4)).unflatten(0, (4, 3)).mean((1, 3)).flatten()
    torch.testing.assert_close(area_of(MASK).on((4, 5)), expected)
    for grid in ((5, 7), (40, 33)):  # any size, up and down, keeps the whole
        torch.testing.assert_close(area_of(MASK).on(grid).mean(), MASK.double().mean())
    torch.testing.assert_close(area_of(MASK).on((24, 40)), MASK.double().repeat_interleave(2, 0).repeat_interleave(2, 1)
                               .flatten())  # fmt: skip


def test_a_mask_for_each_frame_follows_causal_latent_frames() -> None:
    frames = torch.arange(9.0)[:, None, None].expand(-1, 2, 2) / 8
    found = area_of(frames).on((3, 1, 1))
    torch.testing.assert_close(found * 8, torch.tensor([0.0, 2.5, 6.5]).double())  # 0; 1..4; 5..8
    torch.testing.assert_close(area_of(frames).on((9, 1, 1)) * 8, torch.arange(9.0).double())
    torch.testing.assert_close(area_of(frames[:8]).on((4, 1, 1)) * 8, torch.tensor([0.5, 2.5, 4.5, 6.5]).double())
    torch.testing.assert_close(area_of(frames).on((1, 1, 1)) * 8, torch.tensor([4.0]).double())


def test_kinds_of_masks_are_one(tmp_path: Any) -> None:
    hard = MASK > 0.5
    picture = Image.fromarray((hard.numpy() * 255).astype(np.uint8))
    picture.save(tmp_path / "mask.png")
    kinds = [hard, hard.float(), hard.half(), hard.numpy(), hard.long(), hard.to(torch.uint8) * 255, hard.tolist(),
             picture, picture.convert("RGB"), tmp_path / "mask.png", str(tmp_path / "mask.png")]  # fmt: skip
    areas = [area_of(kind) for kind in kinds]
    assert all(area == areas[0] and hash(area) == hash(areas[0]) for area in areas[:-2])
    assert all(torch.equal(area.on((3, 4)), areas[0].on((3, 4))) for area in areas)
    assert area_of([picture, picture]) == area_of(torch.stack([hard, hard]))
    assert area_of(hard) != area_of(~hard)


def test_shares_add_up_and_ids_are_the_largest() -> None:
    here = layout(BOX, MASK, weights=[2.0, 1.0], base=0.25)
    for grid in ((4, 5), (3, 6, 10)):
        left, mask = area_of(BOX).on(grid), area_of(MASK).on(grid)
        rows = torch.stack([(1 - left - mask).clamp(min=0) + 0.25, 2 * left, mask])
        shares = here.shares(grid)
        torch.testing.assert_close(shares, (rows / rows.sum(0)).float())
        ids = here.ids(grid)
        rows[0] -= 0.25  # the base is no place of its own
        assert torch.equal(ids, rows.argmax(0)) and len(ids.unique()) == 3
        assert here.ids(grid) is ids and here.shares(grid) is shares  # kept


def test_ties_go_to_regions_and_to_the_earlier_one() -> None:
    assert layout(BOX, (0.0, 0.0, 1.0, 1.0)).ids((1, 2)).tolist() == [1, 2]
    assert layout((0.0, 0.0, 0.25, 1.0)).ids((1, 2)).tolist() == [1, 0]  # half of a token: no longer the background's


def test_a_small_region_keeps_a_token_on_a_coarse_grid() -> None:
    small = (0.3, 0.3, 0.4, 0.4)
    assert layout(small).ids((2, 2)).tolist() == [1, 0, 0, 0]
    assert layout((0.0, 0.0, 1.0, 1.0), small).ids((2, 2)).tolist() == [2, 1, 1, 1]


def test_more_regions_than_tokens() -> None:
    crowd = RegionLayout([area_of((0.1 * n, 0, 0.1 * n + 0.1, 1)) for n in range(3)], [1.0] * 3, names=["a", "b", "c"])
    with pytest.raises(ValueError, match="b has no token of its own on a grid of 1x2 tokens: others lie over it"):
        crowd.ids((1, 2))
    assert crowd.shares((1, 2)).shape == (4, 2)  # couple can


def test_a_mask_that_covers_nothing_of_a_grid_is_named() -> None:
    speck = torch.zeros(9, 2, 2)
    speck[0] = 1e-12
    with pytest.raises(ValueError, match="the mask of region 2 covers nothing of a grid of 3x2x2 tokens"):
        layout(BOX, speck).ids((3, 2, 2))


def test_copies_are_found_by_keys_of_their_own() -> None:
    here = layout(BOX, MASK)
    for twin in (copy.deepcopy(here), pickle.loads(pickle.dumps(here))):
        assert twin.key != here.key and RegionLayout.by_key(twin.key) is twin
        assert torch.equal(twin.ids((3, 4)), here.ids((3, 4)))
    key = twin.key
    del twin
    with pytest.raises(RuntimeError, match=f"region layout {key} no longer exists"):
        RegionLayout.by_key(key)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"regions=\(\): give at least one"),
    ({"regions": []}, ValueError, "give at least one"),
    ({"regions": (BOX, "a cat")}, ValueError, "number 1 is no"),
    ({"regions": [(BOX, "  ")]}, ValueError, "number 1 has an empty prompt"),
    ({"regions": [(BOX, "a"), ((0, 0, 1.5, 1), "b")]}, ValueError, r"number 2 \('b'\): box .*in 0..1"),
    ({"regions": [((0.5, 0, 0.5, 1), "b")]}, ValueError, "has no inside"),
    ({"regions": [((0, 0, 1), "b")]}, ValueError, r"a mask of shape \(3,\)"),
    ({"regions": [(torch.zeros(4, 4), "b")]}, ValueError, r"\('b'\): a mask of shape \(4, 4\) that covers nothing"),
    ({"regions": [(torch.ones(2, 3, 4, 4), "b")]}, ValueError, r"a mask of shape \(2, 3, 4, 4\): give \(H, W\)"),
    ({"regions": [(torch.ones(0, 4), "b")]}, ValueError, "a mask of shape"),
    ({"regions": [(torch.full((4, 4), 1.2), "b")]}, ValueError, "they lie in 0..1"),
    ({"regions": [(torch.full((4, 4), float("nan")), "b")]}, ValueError, "they lie in 0..1"),
    ({"regions": [("no/such.png", "b")]}, FileNotFoundError, "no mask at no/such.png"),
    ({"regions": [(object(), "b")]}, TypeError, "a region's place is a object"),
    ({"regions": [(BOX, 7)]}, TypeError, "a prompt of int: give a string, or embeddings"),
    ({"regions": [(BOX, torch.ones(3))]}, ValueError, r"embeddings \(3,\): they are \(tokens, channels\)"),
    ({"regions": [(BOX, "b", 0)]}, ValueError, "has weight 0: give a number above 0"),
    ({"regions": [(BOX, "b")], "mode": "hard"}, ValueError, "mode='hard': legal are couple, masked"),
    ({"regions": [(BOX, "b")], "self_attention": True}, ValueError, "legal are full, masked"),
    ({"regions": [(BOX, "b")], "base": -1}, ValueError, "base=-1"),
    ({"regions": [(BOX, "b")], "base": 0.5, "mode": "masked"}, ValueError, "use mode='couple'"),
    ({"regions": [(BOX, "b")], "guidance": "cfg"}, ValueError, "guidance='cfg'"),
    ({"regions": [(BOX, "b")], "max_sequence_length": 0}, ValueError, "max_sequence_length=0"),
    ({"regions": [(BOX, "b")], "backend": "cuda"}, ValueError, "backend='cuda'"),
    ({"regions": [(BOX, "b")], "masks": 1}, TypeError, "unknown option 'masks'"),
]


@pytest.mark.parametrize(("options", "kind", "why"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said(options: dict[str, Any], kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=why):
        RegionsConfig.from_options(**options)


def test_equal_settings_are_equal() -> None:
    one, other = (RegionsConfig.from_options(regions=[(MASK.clone(), "a"), [list(BOX), MASK[None, :4]]]) for _ in "ab")
    assert one == other and hash(one) == hash(other)
    assert one != RegionsConfig.from_options(regions=[(MASK + 1e-3 * (MASK < 0.5), "a"), (BOX, MASK[:4])])
    assert RegionsConfig(regions=(Region(area_of(BOX), "a"),)) == RegionsConfig.from_options(regions=[(BOX, "a", 1)])


def test_as_a_recipe(tmp_path: Any) -> None:
    Image.fromarray((MASK.numpy() * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    config = RegionsConfig.from_options(regions=[(BOX, "a"), (tmp_path / "mask.png", "b", 2)], mode="masked")
    plain = yaml.safe_load(yaml.safe_dump(config.to_options()))
    assert plain["regions"][0] == [[0.0, 0.0, 0.5, 1.0], "a"]
    assert RegionsConfig.from_options(**plain) == config
    for row, why in (((MASK, "a"), "a mask that was never in a file"), ((BOX, MASK), "one that was never in a file")):
        told = yaml.safe_load(yaml.safe_dump(RegionsConfig.from_options(regions=[row]).to_options()))
        with pytest.raises(ValueError, match=why):
            RegionsConfig.from_options(**told)
