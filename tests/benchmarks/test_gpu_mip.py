"""MIP's cases of the GPU benchmark: the definition that the check goes by sees what is wrong."""

import pytest
import torch

from attn_plugins.ops import weighted_merge
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.mip import CASES, ROWS

CASE = next(case for case in CASES if case.name == "mip-sdxl-4k").shrunk()
sdpa = torch.nn.functional.scaled_dot_product_attention


def prepared(dtype=torch.float32):
    return CASE.prepare(Setting(dtype, 16, torch.device("cpu"), tiny=True))


def ours(q, text_k, text_v, phrase_k, image_k, image_v, **more):
    lengths = torch.full((1, CASE.references), more.pop("rows", ROWS))
    return weighted_merge(q, sdpa(q, text_k, text_v), phrase_k, lengths, image_k, image_v, backend="cpu", **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_right_passes(dtype):
    made = prepared(dtype)
    for side in made.sides:
        if side.name in ("ours", "plain"):
            # sums over few rows in float32: whose order is the luckier one is chance
            verdict = made.oracle.judge(side.build().run, gradients=dtype != torch.float32 and side.name == "ours")
            assert verdict.right, (side.name, verdict.errors)


def swapped(q, text_k, text_v, phrase_k, *images):
    return ours(q, text_k, text_v, phrase_k.flip(1), *images)


def uniform(*leaves):
    return ours(*leaves, temperature=1e9)


def spoiled(which):
    """The gradient of one token two percent off, in the last item, where the check looks."""

    def spoil(t):
        return t + 0.02 * torch.nn.functional.pad((t - t.detach())[..., -1:, :], (0, 0, t.shape[-2] - 1, 0))

    return lambda *leaves: ours(*(spoil(t) if i == which else t for i, t in enumerate(leaves)))


WRONG = {
    "phrases swapped": (swapped, "out"),
    "no choice": (uniform, "out"),
    "one row of a phrase": (lambda *leaves: ours(*leaves, rows=1), "out"),
    "a scale": (lambda *leaves: ours(*leaves, scales=0.99), "out"),
    "the stock adapter": (lambda *leaves: prepared().sides[0].build().run(*leaves), "out"),
    "dimage_k of one token": (spoiled(4), "dimage_k"),
    "dimage_v of one token": (spoiled(5), "dimage_v"),
}


@pytest.mark.parametrize(("run", "where"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_fails(run, where):
    verdict = prepared().oracle.judge(run, gradients=True)
    error, allowed = verdict.errors[where]
    assert not verdict.right and not error <= allowed


def test_a_side_without_a_gradient_is_told():
    with pytest.raises(ValueError, match="no gradient of image_k"):
        prepared().oracle.judge(lambda *t: ours(*t[:4], t[4].detach(), t[5]), gradients=True)
