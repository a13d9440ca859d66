"""How far an output is from another (PSNR, SSIM, drift, KL), how much of dense attention was kept (recall), and
whether subjects are kept apart (dice, confusion)."""

from attn_plugins.metrics.confusion import confusion_matrix, confusion_score, dice, dice_loss
from attn_plugins.metrics.divergence import kl_divergence, top1_agreement
from attn_plugins.metrics.drift import Drift, drift
from attn_plugins.metrics.intervals import Interval, mean_interval, quantile
from attn_plugins.metrics.psnr import bit_identical, latent_psnr, psnr
from attn_plugins.metrics.recall import RowShares, attention_rows, row_shares
from attn_plugins.metrics.ssim import ssim

__all__ = [
    "Drift", "Interval", "RowShares", "attention_rows", "bit_identical", "confusion_matrix", "confusion_score",
    "dice", "dice_loss", "drift", "kl_divergence", "latent_psnr", "mean_interval", "psnr", "quantile", "row_shares",
    "ssim", "top1_agreement",
]  # fmt: skip
