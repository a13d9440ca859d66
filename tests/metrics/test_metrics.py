"""Picture metrics against scikit-image in float64; drift against its definition."""

import math

import numpy as np
import pytest
import torch

from attn_plugins.metrics import bit_identical, drift, latent_psnr, psnr, ssim

skimage_metrics = pytest.importorskip("skimage.metrics")


def pictures(*shape: int, noise: float = 0.1, data_range: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    a = torch.rand(*shape, generator=generator, dtype=torch.float64)
    b = (a + noise * torch.randn(*shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return a * data_range, b * data_range


@pytest.mark.parametrize("data_range", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 11, 25), (2, 3, 3, 20, 12)])
def test_against_scikit_image(shape, data_range):
    a, b = pictures(*shape, data_range=data_range)
    got_psnr, got_ssim = psnr(a, b, data_range=data_range), ssim(a, b, data_range=data_range)
    assert got_psnr.shape == got_ssim.shape == shape[:-3]
    for index in np.ndindex(*shape[:-3]):
        x, y = a[index].numpy(), b[index].numpy()
        expected = skimage_metrics.peak_signal_noise_ratio(x, y, data_range=data_range)
        assert got_psnr[index].item() == pytest.approx(expected, rel=1e-10)
        expected = skimage_metrics.structural_similarity(
            x, y, data_range=data_range, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert got_ssim[index].item() == pytest.approx(expected, rel=1e-9)


def test_equal_pictures():
    a, _ = pictures(2, 3, 16, 16)
    assert torch.isinf(psnr(a, a)).all()
    assert torch.equal(ssim(a, a), torch.ones(2, dtype=a.dtype))


def test_half_precision_is_widened():
    a, b = (x.bfloat16() for x in pictures(3, 16, 16, noise=0.02))
    assert ssim(a, b).dtype == psnr(a, b).dtype == torch.float32
    assert psnr(a, b).item() == pytest.approx(psnr(a.double(), b.double()).item(), rel=1e-5)


def test_gradients_flow():
    a, b = pictures(3, 16, 16)
    a.requires_grad_()
    (psnr(a, b) + ssim(a, b)).backward()
    assert torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "a, b, data_range, message",
    [
        (torch.rand(3, 16, 16), torch.rand(3, 16, 15), 1.0, r"\(3, 16, 16\) and \(3, 16, 15\)"),
        (torch.rand(16, 16), torch.rand(16, 16), 1.0, r"\(\.\.\., C, H, W\)"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), torch.rand(3, 16, 16), 1.0, "divide 8-bit ones by 255"),
        (torch.rand(3, 16, 16), torch.rand(3, 16, 16), 0.0, "data_range=0.0"),
    ],
)
def test_errors(metric, a, b, data_range, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b, data_range=data_range)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="pictures of 10 x 32"):
        ssim(torch.rand(3, 10, 32), torch.rand(3, 10, 32))


def test_drift():
    b = torch.tensor([3.0, 4.0])
    assert drift(b, b).relative_l2 == 0 and drift(b, b).cosine == pytest.approx(1)
    moved = drift(torch.tensor([4.0, -3.0]), b)
    assert moved.relative_l2 == pytest.approx(math.sqrt(2)) and moved.cosine == pytest.approx(0)
    assert drift(2 * b, b).relative_l2 == pytest.approx(1)


def test_drift_of_nothing():
    zero = torch.zeros(2)
    assert drift(zero, zero).relative_l2 == 0 and math.isnan(drift(zero, zero).cosine)
    assert drift(torch.ones(2), zero).relative_l2 == math.inf


def test_drift_error():
    with pytest.raises(ValueError, match="one shape"):
        drift(torch.zeros(2), torch.zeros(3))


def test_latent_psnr_is_over_the_reference_range():
    reference = torch.tensor([-1.0, 0.0, 3.0])
    assert latent_psnr(reference + torch.tensor([0.4, 0.0, 0.0]), reference) == pytest.approx(
        10 * math.log10(16 / (0.16 / 3)), abs=1e-5
    )
    assert latent_psnr(3 * reference, 3 * reference) == math.inf
    assert latent_psnr(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == -math.inf, "no range"
    with pytest.raises(ValueError, match="one shape"):
        latent_psnr(torch.zeros(2), torch.zeros(3))


def test_bit_identical():
    a = torch.randn(3, 4)
    assert bit_identical(a, a.clone()) and bit_identical(a.t(), a.t().contiguous())
    assert not bit_identical(torch.zeros(2), -torch.zeros(2)), "equal, but not the same bits"
    assert not bit_identical(a, a.double()) and not bit_identical(a, a[:2])
    assert bit_identical(torch.full((2,), math.nan), torch.full((2,), math.nan))
