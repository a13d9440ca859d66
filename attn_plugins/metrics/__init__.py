"""How far an output is from another (PSNR, SSIM, drift), and how much of dense attention was kept (recall)."""

from attn_plugins.metrics.drift import Drift, drift
from attn_plugins.metrics.psnr import bit_identical, latent_psnr, psnr
from attn_plugins.metrics.recall import RowShares, attention_rows, row_shares
from attn_plugins.metrics.ssim import ssim

__all__ = [
    "Drift", "RowShares", "attention_rows", "bit_identical", "drift", "latent_psnr", "psnr", "row_shares", "ssim",
]  # fmt: skip
