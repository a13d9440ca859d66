"""MIP is trained on an IP-Adapter, and judged beside the adapter as it came, without a merge and with one.

What is judged: the stock adapter; the uniform mean of the references; the training-free merge; and the trained merge,
as it comes back from its file by `load_ip_adapter`. All on the same held-out pairs, with the same noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from attn_plugins.methods.mip import Strengths, make_adapter_trainable, save_adapter
from attn_plugins.metrics.confusion import dice_loss
from attn_plugins.patching import patch, patched
from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.tuning.train_mip_inputs import AdapterInputs, names_of
from attn_plugins.pipelines.tuning.train_mip_judging import decisions, drawn, held_out_maps, set_phrases
from attn_plugins.pipelines.tuning.train_mip_models import reload_adapter
from attn_plugins.pipelines.tuning.tuned_mip import FREE, MEAN, STOCK, TRAINED, Judged, TunedMIP
from attn_plugins.training.loop import LoopSettings, train
from attn_plugins.training.mip import Drops, training_batch
from attn_plugins.training.trainable import trained
from attn_plugins.training.two_objects import ObjectData

DECAY = 0.01  # weight decay of AdamW, as published
SETTINGS: dict[str, dict[str, Any] | None] = {STOCK: None, MEAN: {"temperature": math.inf}, FREE: {}}
FILE = "mip.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MIPSettings(LoopSettings):
    """How to train: as `LoopSettings`. drops: what is left out. dice: weight of the Dice loss between what each layer
    takes of a reference and its object's mask (MultiCrafter, arXiv 2509.21953), 0 in the paper. scale: of the adapter,
    in training and where it is judged. drawn: held-out pairs that are drawn, 0 for none; sampler_steps, guidance: how.

    Raises:
        ValueError: numbers that are not legal.
    """

    lr: float = 1e-4
    drops: Drops = Drops()
    dice: float = 0.0
    scale: float = 1.0
    drawn: int = 64
    sampler_steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dice", "drawn"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")
        for name in ("scale", "sampler_steps", "guidance"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")


class MIPTraining:
    """The whole job.

    Args:
        accelerator: an `accelerate.Accelerator`.
        load: gives a pipeline of Stable Diffusion 1.5 or XL with the IP-Adapter of a file loaded: `load(file)`.
        adapter: the file of the adapter to begin with, or owner/name/path of one on the Hub.
        data: pictures of two objects.
        settings: how.
        out: folder of `mip.safetensors` and of `mip/`, the checkpoint.
    """

    def __init__(
        self,
        accelerator: Any,
        load: Callable[[Path], Any],
        adapter: Path,
        data: ObjectData,
        settings: MIPSettings,
        out: Path,
    ) -> None:
        self.accelerator, self.load, self.adapter = accelerator, load, adapter
        self.data, self.settings, self.out = data, settings, out

    def run(self, *, resume: bool = False) -> TunedMIP:
        """Judge, train, write the file, load it again, judge it.

        Raises:
            ValueError: a folder with a run that is not to be resumed; a file that does not give back what was trained.
        """
        folder = self.out / "mip"
        if folder.exists() and not resume:
            raise ValueError(f"{folder} is there already: resume that run, or give another folder")
        pipe = self.load(self.adapter)
        pipe.to(self.accelerator.device)
        pipe.set_ip_adapter_scale(self.settings.scale)
        pipe.unet.eval()
        judged = {name: self._judge(pipe, options) for name, options in SETTINGS.items()}
        handle = patch(pipe, "mip", phrases=self._names(), train=True, strict=True)
        learned = make_adapter_trainable(handle)
        losses = self._train(pipe, handle, folder, resume)
        file = self.out / FILE
        if self.accelerator.is_main_process:
            save_adapter(handle, self.adapter, file)
        self.accelerator.wait_for_everyone()
        self._reload(pipe, handle, file)
        judged[TRAINED] = self._judge(pipe, {"checkpoint": str(file)})
        return TunedMIP(
            model=type(pipe).__name__, data=repr(self.data), settings=dataclasses.asdict(self.settings),
            processes=self.accelerator.num_processes, weights=sum(part.numel() for part in learned), losses=losses,
            judged=judged, environment=environment(), pairs=[self.data.held_out(n) for n in range(self.settings.drawn)],
        )  # fmt: skip

    def _names(self) -> list[str]:
        return list(self.data.item(0).names)

    def _train(self, pipe: Any, handle: Any, folder: Path, resume: bool) -> list[float]:
        accelerator, settings, unet = self.accelerator, self.settings, pipe.unet
        inputs = AdapterInputs(pipe)
        if settings.checkpointing:
            unet.enable_gradient_checkpointing()

        def loss(wrapped: Any, step: int) -> torch.Tensor:
            batch = training_batch(
                self.data, step, settings.batch, seed=settings.seed, rank=accelerator.process_index,
                processes=accelerator.num_processes,
            )  # fmt: skip
            args, kwargs, target, seen = inputs.forward(batch, settings.drops)
            set_phrases(handle, inputs, names_of(batch.items))
            if not settings.dice:
                return (wrapped(*args, **kwargs)[0].float() - target).square().mean()
            with Strengths(handle) as strengths:
                error = (wrapped(*args, **kwargs)[0].float() - target).square().mean()
            masks = torch.stack([item.masks for item in batch.items]).to(error.device)
            kept = [maps[seen].clamp(0, 1) for maps in strengths.maps] if bool(seen.any()) else []
            apart = [dice_loss(maps, masks[seen]) for maps in kept]
            return error + settings.dice * torch.stack(apart).mean() if apart else error

        def adamw(model: Any, lr: float) -> list[torch.optim.Optimizer]:
            return [torch.optim.AdamW(trained(model), lr=lr, betas=(0.9, 0.999), weight_decay=DECAY)]

        unet.train()
        run = {"data": repr(self.data), "adapter": self.adapter.name}
        parts = accelerator, unet, loss, settings, folder
        losses = train(*parts, run=run, resume=resume, title="MIP", optimizers=adamw)
        unet.eval()
        return losses

    def _judge(self, pipe: Any, options: Mapping[str, Any] | None) -> Judged:
        inputs, settings = AdapterInputs(pipe), self.settings
        handle = None if options is None else patch(pipe, "mip", phrases=self._names(), strict=True, **options)
        try:
            dices, lower = held_out_maps(inputs, handle, self.data, settings.held_out)
            parts = inputs, handle, self.data, settings.drawn
            pictures = drawn(*parts, steps=settings.sampler_steps, guidance=settings.guidance)
        finally:
            if handle is not None:
                handle.remove()
        reads = hasattr(self.data, "told_apart")
        right = decisions(self.data, settings.drawn, pictures) if reads else []
        return Judged(dices, lower, right, pictures)

    def _reload(self, pipe: Any, handle: Any, file: Path) -> None:
        """Unpatched, and with the file's adapter in the place of the trained one, which it must equal to the bit."""
        trained_weights = {name: t.clone() for name, t in _adapter_state(pipe.unet)}
        handle.remove()
        reload_adapter(pipe, file)
        pipe.to(self.accelerator.device)
        pipe.set_ip_adapter_scale(self.settings.scale)
        with patched(pipe, "mip", phrases=self._names(), train=True, checkpoint=str(file)):
            found = dict(_adapter_state(pipe.unet))
        wrong = [
            name
            for name, t in trained_weights.items()
            if name not in found or not torch.equal(t.to(found[name]), found[name])
        ]
        if wrong or found.keys() != trained_weights.keys():
            raise ValueError(f"{file} does not give back what was trained: {', '.join(wrong) or 'other tensors'}")


def _adapter_state(unet: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in unet.state_dict().items():
        if "_ip." in name or "text_to_weight" in name:
            yield name, tensor
