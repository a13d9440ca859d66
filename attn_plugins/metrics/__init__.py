"""How far an output is from another: pictures (PSNR, SSIM), latents (drift)."""

from attn_plugins.metrics.drift import Drift, drift
from attn_plugins.metrics.psnr import psnr
from attn_plugins.metrics.ssim import ssim

__all__ = ["Drift", "drift", "psnr", "ssim"]
