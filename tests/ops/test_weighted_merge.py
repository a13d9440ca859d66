"""`weighted_merge` against the paper's layer, its exact facts, and what it refuses."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attn_plugins.ops import weighted_merge
from attn_plugins.ops.weighted_merge import cpu
from tests.support.live_bytes import LiveBytes
from tests.support.merging import Problem, paper, random_problem
from tests.support.tolerance import within

BACKENDS = ("reference", "cpu")


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    """So that small problems are cut as large ones are."""
    monkeypatch.setattr(cpu, "SLICE_BYTES", 2000)
    torch._dynamo.reset()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [4, 5, 16])
@pytest.mark.parametrize("references", [1, 2, 3])
def test_it_is_the_papers_layer(references, tokens, backend):
    problem = random_problem(10 * references + tokens, references=references, tokens=tokens, plain=True)
    found, weights = problem.run(backend=backend, return_weights=True)
    expected, expected_weights = problem.run(paper, return_weights=True)
    close(found, expected)
    close(weights, expected_weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(60))
def test_random_problems_and_their_gradients(seed, backend):
    problem = random_problem(seed)
    found, expected = problem.results(backend=backend), problem.results(paper)
    for name, one in found.items():
        if "image_lengths" in problem.tensors and name in ("dimage_k", "dimage_v"):
            expected[name] = expected[name].nan_to_num(0.0)
        close(one, expected[name])
        if name == "out" or (backend == "cpu" and not name.startswith("dtext")):
            like = torch.empty_like(problem.tensors["q" if name == "out" else name[1:]])
            strides = zip(one.shape, one.stride(), like.stride(), strict=True)
            assert all(ours == asked for size, ours, asked in strides if size > 1), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_pytorch_in_the_same_precision(seed, dtype):
    problem = random_problem(seed, head_dim=32, positions=60).to(dtype)
    theirs, exact = problem.results(paper), problem.to(torch.float64).results(paper)
    for name, one in problem.results().items():
        fine = exact[name].nan_to_num(0.0), theirs[name].nan_to_num(0.0)
        assert within(one, fine[1], fine[0]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_reference_is_the_ip_adapter(backend):
    t = {**random_problem(1, references=1, plain=True).tensors}
    t.pop("text_weight")
    plain = t["text_out"] + 0.6 * sdpa(t["q"], t["image_k"][:, 0], t["image_v"][:, 0])
    close(weighted_merge(**t, scales=0.6, backend=backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_phrase_for_all_is_their_mean(backend):
    t = {**random_problem(2, references=3, plain=True).tensors}
    t.pop("text_weight")
    t["phrase_k"], t["phrase_lengths"] = (t[n][:, :1].repeat_interleave(3, 1) for n in ("phrase_k", "phrase_lengths"))
    each = [sdpa(t["q"], t["image_k"][:, i], t["image_v"][:, i]) for i in range(3)]
    close(weighted_merge(**t, backend=backend), t["text_out"] + sum(each) / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_temperature_is_the_mean(backend):
    problem = random_problem(2, references=3, plain=True)
    _, weights = problem.run(temperature=math.inf, return_weights=True, backend=backend)
    close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_the_references_says_nothing_and_swapped_phrases_do(backend):
    t = {**random_problem(3, references=3, plain=True).tensors}
    names = ("phrase_k", "phrase_lengths", "image_k", "image_v")
    turned = {**t, **{name: t[name].flip(1) for name in names}}
    close(weighted_merge(**turned, backend=backend), weighted_merge(**t, backend=backend))
    swapped = {**t, **{name: t[name].flip(1) for name in names[:2]}}
    assert (weighted_merge(**swapped, backend=backend) - weighted_merge(**t, backend=backend)).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_weight_of_its_own_for_each_reference(backend):
    t = {**random_problem(3, references=3, plain=True).tensors}
    one, rows = t.pop("text_weight"), torch.randn(3, t["q"].shape[1] * t["q"].shape[3], dtype=torch.float64)
    same = weighted_merge(**t, text_weight=one.expand(3, -1), backend=backend)
    close(same, weighted_merge(**t, text_weight=one, backend=backend))
    parts = [
        weighted_merge(**t, text_weight=row, scales=[float(i == j) for j in range(3)], backend=backend) - t["text_out"]
        for i, row in enumerate(rows)
    ]
    rows.requires_grad_()
    found = weighted_merge(**t, text_weight=rows, backend=backend)
    close(found, t["text_out"] + sum(parts))
    found.square().sum().backward()
    assert (rows.grad.abs().sum(1) > 0).all()
    with pytest.raises(ValueError, match="text_weight has 2 rows: give one, or one for each of 3"):
        weighted_merge(**t, text_weight=rows[:2], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_queries_for_the_phrases_are_in_the_weights_alone(backend):
    t = {**random_problem(3, references=3, plain=True).tensors}
    other = torch.randn_like(t["q"]).requires_grad_()
    out, weights = weighted_merge(**t, phrase_q=other, return_weights=True, backend=backend)
    assert not out.requires_grad
    close(weights, weighted_merge(**{**t, "q": other.detach()}, return_weights=True, backend=backend)[1])
    close(out, weighted_merge(**t, masks=weights, temperature=math.inf, backend=backend))  # masks are then the weights
    with pytest.raises(ValueError, match=r"phrase_q \(.*\): it is of the positions of q"):
        weighted_merge(**t, phrase_q=other[:, :, 1:])
    with pytest.raises(TypeError, match="phrase_q torch.float32: cast them to one"):
        weighted_merge(**t, phrase_q=other.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_that_are_alike_do_not_depend_on_the_phrases(backend):
    """The unconditional half of guidance: every reference has the same image tokens there."""
    t = {**random_problem(4, references=3, plain=True).tensors}
    for name in ("image_k", "image_v"):
        t[name] = t[name][:, :1].repeat_interleave(3, 1)
    other = {**t, "phrase_k": torch.randn_like(t["phrase_k"])}
    close(weighted_merge(**t, backend=backend), weighted_merge(**other, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_that_share_out_the_positions_are_the_weights(backend):
    t = {**random_problem(5, references=3, plain=True, positions=30).tensors}
    t.pop("text_weight")
    owner = torch.randint(0, 4, (1, 1, 30))  # 3: no one's
    masks = (owner == torch.arange(3)[:, None]).double()
    noisy = torch.where(masks > 0, 1.02, -0.03)  # bicubic masks leave 0..1
    out, weights = weighted_merge(**t, masks=noisy, scales=[0.4, 0.5, 0.6], return_weights=True, backend=backend)
    close(weights, masks.expand_as(weights))
    stock = t["text_out"]
    for i, scale in enumerate([0.4, 0.5, 0.6]):
        z = sdpa(t["q"], t["image_k"][:, i], t["image_v"][:, i])
        stock = stock + scale * z * masks[:, i, None, :, None]
    close(out, stock)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_masks_keep_their_strength(backend):
    t = {**random_problem(6, references=1, plain=True, positions=30).tensors}
    mask = torch.rand(1, 1, 30, dtype=torch.float64)
    _, weights = weighted_merge(**t, masks=mask, return_weights=True, backend=backend)
    close(weights, mask.expand_as(weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_null_column_takes_what_belongs_to_no_one(backend):
    problem = random_problem(7, references=2, plain=True)
    sums = [problem.run(null_bias=bias, return_weights=True, backend=backend)[1].sum(1) for bias in (-40.0, 0.0, 40.0)]
    close(sums[0], torch.ones_like(sums[0]))
    assert (sums[1] > 0.05).all() and (sums[1] < 0.95).all() and (sums[2] < 1e-6).all()


def test_one_biased_attention_over_all_tokens():
    """Equal to the softmax over N T tokens with bias log w_i - LSE_i, and not to that with log w_i."""
    t = {**random_problem(8, references=2, tokens=4, plain=True).tensors}
    t.pop("text_weight")
    out, w = weighted_merge(**t, return_weights=True)
    keys, values = (t[name].transpose(1, 2).flatten(2, 3) for name in ("image_k", "image_v"))
    scores = torch.einsum("bhsd,brhtd->brhst", t["q"], t["image_k"]) * t["q"].shape[-1] ** -0.5
    bias = (w.log()[:, :, None] - scores.logsumexp(-1)).permute(0, 2, 3, 1).repeat_interleave(4, -1)
    close(out, t["text_out"] + sdpa(t["q"], keys, values, attn_mask=bias))
    joint = w.log()[:, None].transpose(-1, -2).repeat_interleave(4, -1).expand_as(bias)
    assert (out - t["text_out"] - sdpa(t["q"], keys, values, attn_mask=joint)).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_nan_at_twenty_times_the_scores(dtype, backend):
    problem = random_problem(9, references=3, plain=True, positions=200, head_dim=40)
    problem.tensors["q"] *= 20
    problem.tensors["text_weight"] *= 20
    problem = problem.to(dtype)
    out, weights = problem.run(return_weights=True, backend=backend)
    assert out.isfinite().all() and weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights.sum(1)))
    plain = torch.softmax(problem.tensors["phrase_k"].nan_to_num()[:1, :, :1] @ problem.tensors["q"][0, :1].mT, -1)
    assert dtype != torch.float16 or (plain[..., 0, :].sum(1) == 0).any(), "the plain ratio would do here"


def test_an_absent_reference_counts_nothing():
    t = {**random_problem(3, references=3, plain=True).tensors}
    few = {**t, **{name: t[name][:, 1:] for name in ("phrase_k", "phrase_lengths", "image_k", "image_v")}}
    t["phrase_lengths"] = t["phrase_lengths"].clone()
    t["phrase_lengths"][:, 0] = 0
    close(weighted_merge(**t), weighted_merge(**few))
    t["phrase_lengths"][:] = 0
    close(weighted_merge(**t), t["text_out"])
    t["phrase_lengths"][:] = 1
    close(weighted_merge(**t, image_lengths=[0, 0, 0]), t["text_out"])


def test_no_positions_and_no_items():
    t = random_problem(3, references=3, plain=True).tensors
    none = {**t, "q": t["q"][:, :, :0], "text_out": t["text_out"][:, :, :0]}
    nobody = {name: one if name == "text_weight" else one[:0] for name, one in t.items()}
    for tensors in (none, nobody):
        found = Problem(tensors, {}).results()
        assert found["out"].shape == tensors["q"].shape and not found["dimage_k"].any()


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_one_graph_with_gradients(seed):
    problem = random_problem(seed)
    found = problem.results(torch.compile(weighted_merge, fullgraph=True, backend="aot_eager"))
    for name, one in problem.results().items():
        torch.testing.assert_close(found[name], one, equal_nan=True)


def test_the_ops_are_sound_for_torch_library():
    t = {name: one.float() if one.is_floating_point() else one for name, one in random_problem(2).tensors.items()}
    ops = torch.ops.attn_plugins
    torch.library.opcheck(
        ops.reference_weights.default,
        (t["q"], t["phrase_k"].nan_to_num(), t["phrase_lengths"], None, 0.3, 1.0, -1.0, False),
    )
    k, v = (t[name].nan_to_num() for name in ("image_k", "image_v"))
    strengths = torch.rand(k.shape[0], k.shape[1], t["q"].shape[2])
    leaves = [one.clone().requires_grad_() for one in (t["q"], t["text_out"], k, v, strengths)]
    torch.library.opcheck(ops.merge_references.default, (*leaves, None, 0.3, False))
    torch.library.opcheck(ops.merge_references_backward.default, (t["q"], t["q"], k, v, strengths, None, 0.3))


def test_memory_is_that_of_a_slice(monkeypatch):
    """SDXL's 4,096 positions, ten heads, four references of 16 tokens: scores alone would take 84 MB."""
    monkeypatch.undo()
    q, text = (torch.randn(2, 4096, 10, 64).transpose(1, 2) for _ in range(2))
    phrase_k, images = torch.randn(1, 4, 10, 6, 64), torch.randn(2, 4, 10, 16, 64)
    lengths = torch.full((1, 4), 6)
    with LiveBytes([q, text, phrase_k, images, lengths]) as live:
        out = weighted_merge(q, text, phrase_k, lengths, images, images)
    assert live.peak - out.numel() * 4 < 6 * cpu.SLICE_BYTES


def problem_with(**changes) -> Problem:
    made = random_problem(3, references=3, plain=True)
    return Problem({**made.tensors, **changes}, {})


WRONG = {
    "text": ({"text_out": torch.zeros(1, 1, 1, 1)}, ValueError, r"text_out \(1, 1, 1, 1\): both are \(batch, heads"),
    "phrases": ({"phrase_k": torch.zeros(1, 2, 1, 1, 8)}, ValueError, "one phrase for each reference"),
    "images": ({"image_k": torch.zeros(1, 2, 1, 1, 8)}, ValueError, r"both are \(batch, references, heads, tokens"),
    "lengths": ({"phrase_lengths": torch.full((1, 3), 99)}, ValueError, r"phrase_lengths are 99..99: legal are 0\.\."),
    "floats": ({"phrase_lengths": torch.ones(1, 3)}, TypeError, "phrase_lengths is torch.float32: give int32 or int64"),
    "dtype": ({"text_out": None}, TypeError, "cast them to one floating dtype"),
    "weight": ({"text_weight": torch.ones(7)}, ValueError, r"text_weight \(7,\): it has one number for each of"),
    "scales": ({"scales": [1.0, 2.0]}, ValueError, r"scales=\[1.0, 2.0\]: give one, or one for each of 3"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature=0.0: give a positive number"),
    "masks": ({"masks": torch.ones(3, 4)}, ValueError, r"masks \(3, 4\): give \(1 or"),
    "tokens": ({"image_lengths": [1, 2]}, ValueError, r"image_lengths \(1, 2\): give \(1 or"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu': legal are"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together(changes, error, message):
    tensors = problem_with().tensors
    if changes.get("text_out", 0) is None:
        changes = {"text_out": tensors["text_out"].float()}
    with pytest.raises(error, match=message):
        weighted_merge(**{**tensors, **changes})
