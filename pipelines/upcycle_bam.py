"""N dense checkpoints in, one mixture out: BAM (arXiv 2408.08274), BTX (2403.07816) and sparse upcycling (2212.05055).

All checks come first. The mixture is then written tensor by tensor into a folder beside the one that was asked for, and
gets its name when it is whole; a run that was interrupted goes on after the last whole shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attn_plugins.models.bam import Architecture, of
from attn_plugins.models.bam.config import HOME, config_class
from attn_plugins.pipelines.upcycle import checks as checks
from attn_plugins.pipelines.upcycle.checkpoint import INDEX, Checkpoint, bytes_of, read_header
from attn_plugins.pipelines.upcycle.options import UpcycleSettings
from attn_plugins.pipelines.upcycle.report import UpcycleReport, report
from attn_plugins.pipelines.upcycle.routers import rows_of_prompts
from attn_plugins.pipelines.upcycle.tensors import Mixing
from attn_plugins.pipelines.upcycle.writer import alone, settle, shards, write_shard, write_text

REPORT, STATE = "upcycle.json", "unfinished.json"
SHARD = 4_000_000_000  # bytes
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "chat_template*", "generation_config.json", "preprocessor_config.json",
)  # fmt: skip

Tick = Callable[[str, int], None]


@dataclass(frozen=True)
class Plan:
    """All that is known before anything is written. `size`: bytes of the tensors."""

    settings: UpcycleSettings
    base: Checkpoint
    mixing: Mixing
    report: UpcycleReport
    size: int

    def state(self, shard: int) -> dict[str, Any]:
        """What has to be as it was for an interrupted run to go on."""
        told = {"settings": asdict(self.settings), "shard": shard, "dtype": str(self.mixing.dtype)}
        sources = [checkpoint.fingerprint() for checkpoint in (self.base, *self.mixing.members)]
        return json.loads(json.dumps({**told, "sources": sources}))


def plan(settings: UpcycleSettings) -> Plan:
    """Read configs and headers, and check that the experts can be mixed. Nothing is written.

    Raises:
        ValueError: see `upcycle_checkpoint`, `upcycle_checks`.
    """
    from attn_plugins.models.bam.model import part_class

    base = Checkpoint.open(settings.base_model)
    row = _architecture(base)
    if row.vision and settings.router_init == "hidden":
        raise ValueError(f"router_init: hidden reads prompts, and {row.prefix} models read pictures: give random")
    opened = {settings.base_model: base}
    for member in settings.members:
        if member.source not in opened:
            opened[member.source] = Checkpoint.open(member.source)
    members = [opened[member.source] for member in settings.members]
    checks.one_architecture(base, [checkpoint for checkpoint in opened.values() if checkpoint is not base], row)
    dtype = _dtype(settings, base)
    config = _config(settings, base, row, dtype)
    with torch.device("meta"):
        dense = row.dense_class(row.head)(base.config)
        mixture = part_class(row, row.head)(config)
    shapes, dense_shapes = _shapes(mixture), _shapes(dense)
    names = checks.all_tensors(dense, members, row)
    mixing = Mixing(row, config, members, names, shapes, dtype, settings.seed)
    routed = [name for name in shapes if mixing.source(name).kind == "experts"]
    unknown = {dense_name for name in shapes for dense_name in mixing.source(name).names} - dense_shapes.keys()
    if not routed or unknown:
        raise RuntimeError(
            f"{row.name}: {len(routed)} tensors are routed, unknown are {sorted(unknown)}; this is our fault"
        )
    if settings.method != "sparse_upcycle" and not settings.allow_identical:
        checks.experts_differ(members, names, mixing.routed())
    labels = [member.name for member in settings.members]
    found = report(config, shapes, dense_shapes, len(routed), labels, settings.method, dtype)
    return Plan(settings, base, mixing, found, sum(bytes_of(shape, dtype) for shape in shapes.values()))


def upcycle(
    settings: UpcycleSettings | Plan, out: str | Path, *, shard: int = SHARD, tick: Tick = lambda what, amount: None
) -> UpcycleReport:
    """Make the mixture in folder `out`, which `AutoModelForCausalLM.from_pretrained` then loads (of pictures,
    `AutoModelForImageClassification`).

    Args:
        settings: what to do, or `plan(settings)`.
        shard: bytes of a file.
        tick: called with a tensor's name and bytes written; `plan(settings).size` in all, also when a run goes on.

    Returns:
        The report, which lies in `out` as upcycle.json too.

    Raises:
        ValueError: experts that cannot be mixed; an unfinished run of something else in the way, or
            another run that is still writing there.
        FileExistsError: `out` is there.
        OSError: the disk has no room.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists: give a folder that does not, or remove it first")
    found = settings if isinstance(settings, Plan) else plan(settings)
    work = out.with_name(out.name + ".unfinished")
    mixing, state = found.mixing, found.state(shard)
    files = shards(dict(mixing.shapes), mixing.dtype, shard)
    with contextlib.ExitStack() as held:
        there = work.is_dir()
        if there:
            held.enter_context(alone(work))
        done = _resume(work, state)
        rest = [name for file, names in files.items() if file not in done for name in names]
        checks.room_for(out.parent, sum(bytes_of(mixing.shapes[name], mixing.dtype) for name in rest))
        if found.settings.router_init == "hidden" and rest:
            mixing = _with_routers(found)
        work.mkdir(parents=True, exist_ok=True)
        if not there:
            held.enter_context(alone(work))
        write_text(work / STATE, json.dumps(state))
        for file, names in files.items():
            if file in done:
                tick(file, sum(bytes_of(mixing.shapes[name], mixing.dtype) for name in names))
            else:
                write_shard(work / file, names, dict(mixing.shapes), mixing.dtype, mixing.pieces, tick)
        _write_rest(found, files, work)
        _verify(found, files, work)
        settle(work)
        os.replace(work, out)
    (out / STATE).unlink()
    return found.report


def _architecture(base: Checkpoint) -> Architecture:
    try:
        return of(base.config.model_type)
    except ValueError as error:
        raise ValueError(f"{base.folder}: {error}") from error


def _dtype(settings: UpcycleSettings, base: Checkpoint) -> torch.dtype:
    told = settings.dtype or getattr(base.config, "dtype", None) or "float32"
    return told if isinstance(told, torch.dtype) else getattr(torch, str(told).removeprefix("torch."))


def _config(settings: UpcycleSettings, base: Checkpoint, row: Architecture, dtype: torch.dtype) -> Any:
    told = base.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "dtype"):
        told.pop(key, None)
    stub = HOME.rsplit(".", 1)[-1]
    parts = {"AutoConfig": "Config", "AutoModel": "Model", row.auto: row.head}
    return config_class(row)(
        **told,
        num_experts=len(settings.members),
        attention_experts=settings.attention,
        num_experts_per_tok=settings.top_k,
        expert_gate=settings.gate,
        router_aux_loss_coef=settings.balance,
        router_z_loss_coef=settings.z,
        expert_names=[member.name for member in settings.members],
        architectures=[row.class_name(row.head)],
        auto_map={auto: f"{stub}.{row.class_name(part)}" for auto, part in parts.items()},
        dtype=dtype,
    )


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _resume(work: Path, state: dict[str, Any]) -> set[str]:
    """The whole shards of an interrupted run; files that are not whole are removed."""
    if not work.exists():
        return set()
    try:
        before = json.loads((work / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != state:
        raise ValueError(
            f"{work} holds an unfinished run with other settings or other experts, or none that can be told: remove "
            "it first"
        )
    for path in work.glob("*.part"):
        path.unlink()
    return {path.name for path in work.glob("model*.safetensors")}


def _with_routers(found: Plan) -> Mixing:
    """With the rows of its experts' prompts: the one time that a whole model, the base, is in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mixing, folder = found.mixing, found.base.folder
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts = [member.prompts for member in found.settings.members]
    routers = [name for name in mixing.shapes if mixing.source(name).kind == "router"]
    return replace(mixing, routers=rows_of_prompts(model, tokenizer, mixing.row, prompts, routers))


def _write_rest(found: Plan, files: dict[str, list[str]], work: Path) -> None:
    """Index, config with the file that remote code starts from, the base's tokenizer, report."""
    for pattern in _BESIDE:
        for path in found.base.folder.glob(pattern):
            shutil.copyfile(path, work / path.name)
    found.mixing.config.save_pretrained(work)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = {"total_parameters": found.report.parameters, "total_size": found.size}
        write_text(work / INDEX, json.dumps({"metadata": total, "weight_map": weight_map}, indent=1) + "\n")
    write_text(work / REPORT, json.dumps(found.report.to_dict(), indent=1) + "\n")


def _verify(found: Plan, files: dict[str, list[str]], work: Path) -> None:
    """Every tensor that the mixture has is in the shards, with its shape, and nothing else is."""
    there = {name: tuple(row["shape"]) for file in files for name, row in read_header(work / file).items()}
    if there != dict(found.mixing.shapes):
        raise RuntimeError(
            f"{work}: what was written is not the mixture that was planned; this is our fault, not yours"
        )
