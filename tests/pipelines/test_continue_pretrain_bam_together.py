"""Mixtures made and trained by two processes: they do what one does, none waits for one that failed, and of two that
upcycle the same at once one does it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_plugins.pipelines import upcycle_bam
from attn_plugins.pipelines.tuning import continue_pretrain_bam
from attn_plugins.pipelines.tuning.continue_pretrain_bam import BamPretraining
from attn_plugins.pipelines.tuning.tuned_bam import DENSE, MIXTURES, SEED, TunedBam
from attn_plugins.pipelines.upcycle.options import Expert, UpcycleSettings
from attn_plugins.training.loop import LoopSettings
from attn_plugins.training.processes import by_all, by_main
from attn_plugins.training.tasks.text import TextTask
from tests.support.bam import dense, saved
from tests.support.together import together

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_accelerator")


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def pretrained(folder: Path, batch: int) -> TunedBam:
    ids = torch.randint(1, 50, (800,), generator=torch.Generator().manual_seed(1)).tolist()
    tasks = {
        "a": TextTask(tiny_llama, ids[:300], ids[300:400], 8, 4),
        "b": TextTask(tiny_llama, ids[400:], ids[:99], 8, 4),
    }
    settings = LoopSettings(steps=2, batch=batch, lr=1e-2, warmup=1, held_out=4)
    accelerator = accelerate.Accelerator(cpu=True)
    kinds = {"bam_shared_kv": MIXTURES["bam_shared_kv"]}
    return BamPretraining(accelerator, tasks, settings, settings, folder, kinds).run()


def upcycled(folder: Path, wait: float = 0.0, out: str = "out") -> str | int:
    """The mixture's parameters, or why there is none."""
    told = UpcycleSettings(str(folder / "seed"), (Expert(str(folder / "expert"), "e1"),))
    try:
        tick = lambda *_: time.sleep(wait)  # noqa: E731
        return upcycle_bam.upcycle(told, folder / out, shard=5_000, tick=tick).parameters
    except (ValueError, FileExistsError) as error:
        return str(error)


def in_each_process(rank: int, folder: Path) -> dict[str, Any]:
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # accelerate wants to see one, although the processes have met already
    transformers.logging.disable_progress_bar()
    found: dict[str, Any] = {"failures": []}
    accelerator = accelerate.Accelerator(cpu=True)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    def in_the_second() -> None:
        if rank == 1:
            fail()

    upcycle, continue_pretrain_bam.upcycle = continue_pretrain_bam.upcycle, fail  # type: ignore[assignment]
    for work in (
        lambda: pretrained(folder / "fails", 1),
        lambda: by_main(accelerator, fail),
        lambda: by_all(accelerator, in_the_second),
    ):
        try:
            work()
        except Exception as error:
            found["failures"].append(f"{type(error).__name__}: {error}")
    continue_pretrain_bam.upcycle = upcycle
    tuned = pretrained(folder / "whole", 1)
    found["upcycled"] = upcycled(folder, wait=0.002)
    return {**found, "losses": tuned.losses, "held_out": tuned.held_out, "processes": tuned.processes}


def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    one = pretrained(tmp_path / "one", 2)
    for number, name in enumerate(("seed", "expert")):
        saved(dense("llama", number), tmp_path / name)
    first, second = together(in_each_process, tmp_path)
    mine, other = "OSError: no space left", "RuntimeError: it failed in process {}: OSError: no space left"
    assert first["failures"] == [mine, mine, other.format(1)]
    assert second["failures"] == [other.format(0), other.format(0), mine]
    assert first["processes"] == 2 and first["losses"] == second["losses"] and first["held_out"] == second["held_out"]
    for name in ("expert: a", "expert: b", DENSE):
        torch.testing.assert_close(first["losses"][name], one.losses[name], rtol=1e-5, atol=0)
        for domain in "ab":
            torch.testing.assert_close(first["held_out"][name][domain], one.held_out[name][domain], rtol=1e-4, atol=0)
    # A mixture's balance loss counts over the tokens of each process, so that only the first step is the same.
    assert first["losses"]["bam_shared_kv"][0] == pytest.approx(one.losses["bam_shared_kv"][0], rel=1e-5)
    assert first["held_out"][DENSE]["a"] != first["held_out"][SEED]["a"]

    pytest.importorskip("fcntl")
    refusal, parameters = sorted((first["upcycled"], second["upcycled"]), key=lambda one: isinstance(one, int))
    assert "another run" in refusal or "out exists" in refusal
    assert parameters == upcycled(tmp_path, out="alone") and not (tmp_path / "out.unfinished").exists()
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_one_process_raises_what_it_was() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    done: list[int] = []
    accelerator = accelerate.Accelerator(cpu=True)
    by_main(accelerator, lambda: done.append(1))
    by_all(accelerator, lambda: done.append(2))
    assert done == [1, 2]
    with pytest.raises(KeyboardInterrupt):
        by_main(accelerator, stop)
