"""A small model becomes a mixture of its specialists, and is trained on: branch, train, mix, train.

The seed, a language model or a vision transformer, is trained on one domain (code, handwriting), and from the same
start on another (prose, photographs). Seed and specialists become mixtures: BTX, BAM with shared keys and values, BAM
with each expert's own. Every mixture is trained on all domains, and so is the dense seed, for as many steps, and once
more for as many as all runs behind a mixture have together. All are judged on the same held-out items of each domain.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from attn_plugins.models.bam import of
from attn_plugins.models.bam.watching import watch_routers
from attn_plugins.pipelines.environment import environment
from attn_plugins.pipelines.tuning.tuned_bam import DENSE, DENSE_LONG, MIXTURES, SEED, TunedBam
from attn_plugins.pipelines.upcycle.options import Expert as Member
from attn_plugins.pipelines.upcycle.options import UpcycleSettings
from attn_plugins.pipelines.upcycle_bam import upcycle
from attn_plugins.training.loop import LoopSettings
from attn_plugins.training.processes import by_main
from attn_plugins.training.routers import RouterRow
from attn_plugins.training.tasks import Task, held_out_losses, train_task
from attn_plugins.training.tasks.mixed import MixedTask
from attn_plugins.training.trainable import make_trainable


class BamPretraining:
    """The whole job.

    Args:
        accelerator: an `accelerate.Accelerator`.
        tasks: by domain, of language models or of picture classifiers; all load the same seed.
        settings: of the training of a mixture; `branch` of a specialist's.
        out: folder of the specialists, the mixtures and the dense runs.
        method_options: by mixture, of `UpcycleSettings`; default: the three.
    """

    def __init__(
        self,
        accelerator: Any,
        tasks: Mapping[str, Task],
        settings: LoopSettings,
        branch: LoopSettings,
        out: Path,
        method_options: Mapping[str, Mapping[str, Any]] = MIXTURES,
    ) -> None:
        self.accelerator, self.tasks, self.out = accelerator, dict(tasks), out
        self.settings, self.branch, self.method_options = settings, branch, method_options
        odd = [name for name in self.tasks if name == SEED or Path(name).name != name]
        if odd:
            raise ValueError(f"the domain {odd[0]!r} is no name of a folder beside {SEED!r}: give another name")
        self.mix = MixedTask(list(self.tasks.values()))
        self.held_out: dict[str, dict[str, list[float]]] = {}
        self.losses: dict[str, list[float]] = {}
        self.routers: dict[str, dict[str, list[RouterRow]]] = {}
        self.sizes: dict[str, int] = {}
        self.model_type = ""

    def run(self, *, resume: bool = False) -> TunedBam:
        """Everything; `resume` takes up what lies in the folder.

        Raises:
            ValueError: a folder with a run that is not to be resumed.
        """
        if (self.out / "branches").exists() and not resume:
            raise ValueError(f"{self.out / 'branches'} is there already: resume that run, or give another folder")
        seed = self._seed()
        self.model_type = of(seed.config.model_type).name  # or BAM does not mix it: said before anything is trained
        self._judge(SEED, seed)
        self._save(seed, self.out / "branches" / SEED)
        for domain, task in self.tasks.items():
            self._trained(f"expert: {domain}", self._seed, task, self.branch, self.out / "branches" / domain)
        for name, options in self.method_options.items():
            start = self._upcycled(name, options)
            self._judge(f"{name}, untrained", start())
            self._trained(name, start, self.mix, self.settings, self.out / name)
        self._trained(DENSE, self._seed, self.mix, self.settings, self.out / "dense")
        long = self.settings.steps + len(self.tasks) * self.branch.steps
        self._trained(
            DENSE_LONG, self._seed, self.mix, dataclasses.replace(self.settings, steps=long), self.out / "dense_long"
        )
        return TunedBam(
            model=type(seed).__name__, tasks={domain: repr(task) for domain, task in self.tasks.items()},
            unit=self.mix.unit, settings=dataclasses.asdict(self.settings), branch=dataclasses.asdict(self.branch),
            processes=self.accelerator.num_processes, sizes=self.sizes, held_out=self.held_out, losses=self.losses,
            routers=self.routers, environment=environment(),
        )  # fmt: skip

    def _seed(self) -> Any:
        """In float32 whatever it was saved in, as the mixtures are: all are trained alike."""
        return self.mix.load().float()

    def _trained(self, name: str, load: Callable[[], Any], task: Task, settings: LoopSettings, folder: Path) -> None:
        model = load()
        make_trainable(model, checkpointing=settings.checkpointing)
        model.to(self.accelerator.device)
        joined = getattr(model, "joined", None)  # a mixture adds its routers' losses there
        self.losses[name] = train_task(
            self.accelerator, model, task, settings, folder / "checkpoint", resume=True, title=name,
            joined=None if joined is None else model.joined,
        )  # fmt: skip
        self._save(model, folder)
        self._judge(name, model)

    def _upcycled(self, name: str, options: Mapping[str, Any]) -> Callable[[], Any]:
        import transformers

        folder, branches = self.out / name / "start", self.out / "branches"

        def mix() -> None:
            if folder.exists():
                return
            folder.parent.mkdir(parents=True, exist_ok=True)
            # An unfinished one cannot go on: the experts' files have been written again since.
            shutil.rmtree(folder.with_name(folder.name + ".unfinished"), ignore_errors=True)
            experts = tuple(Member(str(branches / domain), domain) for domain in self.tasks)
            upcycle(UpcycleSettings(str(branches / SEED), experts, **options), folder)

        by_main(self.accelerator, mix)
        auto = getattr(transformers, of(self.model_type).auto)
        return lambda: auto.from_pretrained(folder, dtype=torch.float32)

    def _save(self, model: Any, folder: Path) -> None:
        by_main(self.accelerator, lambda: model.save_pretrained(folder))

    def _judge(self, name: str, model: Any) -> None:
        """Losses by domain; of a mixture, what its routers did with each."""
        model.to(self.accelerator.device)
        self.sizes[name] = sum(part.numel() for part in model.parameters())
        routed = hasattr(model, "joined")
        for domain, task in self.tasks.items():
            watch = watch_routers(model) if routed else None
            found = held_out_losses(self.accelerator, model, task, self.settings.held_out)
            self.held_out.setdefault(name, {})[domain] = found
            if watch is not None:
                rows = watch.rows(lambda sums: self.accelerator.reduce(sums.to(self.accelerator.device), "sum"))
                self.routers.setdefault(name, {})[domain] = rows
                watch.close()
