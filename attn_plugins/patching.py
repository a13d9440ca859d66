"""The one line: model -> family -> method -> sites, with an undo record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from attn_plugins import grafting, recipe, record, registry, weights
from attn_plugins.handle import PatchHandle
from attn_plugins.method import Method, MethodConfig
from attn_plugins.patches.family import Site
from attn_plugins.patches.steps import StepClock
from attn_plugins.patches.versions import warn_if_untested
from attn_plugins.record import SITE_ATTRIBUTE, Patched
from attn_plugins.runtime import Layer, RootState
from attn_plugins.schedule import Schedule, Steps
from attn_plugins.selection import select
from attn_plugins.targets import Target, find

# What stays in other libraries after `unpatch`: names that nothing uses until a model is patched again.
GLOBALS: tuple[str, ...] = (
    "diffusers.hooks._helpers.AttentionProcessorRegistry: an entry for the stand-in of each patched processor class "
    "(LayerSkip looks processors up by exact class)",
    "transformers' AttentionInterface and AttentionMaskInterface: one entry each, named 'attn_plugins'",
)


def patch(
    obj: object,
    method: str | Path | Method | None = None,
    *,
    quality: str = "balanced",
    preset: str | None = None,
    layers: Any = None,
    dense_steps: Steps | tuple[Steps, Steps] | None = None,
    num_steps: int | None = None,
    backend: str = "auto",
    strict: bool = False,
    min_tokens: int | tuple[int, int] | None = None,
    **options: Any,
) -> PatchHandle:
    """Swap the attention of a pipeline or model for a method; `unpatch` takes it back exactly.

    Args:
        obj: a pipeline (all its denoisers), a model (also inside torch.compile or PEFT), or a list of them.
        method: a name (`attn_plugins.available()` lists them), a recipe file written by `handle.save`, or a Method.
            None: what the presets recommend for this model. "bam" is by itself: it takes `experts`, other models
            whose attention is put beside this one's (docs/bam.md), `attention` and `seed`, and no other setting.
        quality: "safe", "balanced" or "fast": which of a preset's settings to take.
        preset: a preset by name; None: the one made for this model, if there is one.
        layers: which layers; see `attn_plugins.selection.select`.
        dense_steps: first steps of a generation that stay dense: a float is a share of the schedule, an int a number.
            A pair is of the first and of the last steps: (0, 0.6).
        num_steps: length of the schedule, needed for a share on a bare model.
        backend: "auto", "cpu", "triton" or "reference", for methods that have a choice.
        strict: raise where a call would stay dense with a warning.
        min_tokens: calls with a smaller grid stay dense (UNets have several sizes). A pair is on a CPU and elsewhere.
            None: the most of what the preset (or else the family) and the method ask for.
        **options: the method's own; they win over the preset's.

    Returns:
        The handle. Patching again with the same method and settings returns the same handle and changes nothing.

    Raises:
        ValueError: unknown method or preset, no family, zero sites, a site that another patch holds, illegal settings.
        TypeError: an unknown option, or an attention processor that cannot be got between.
    """
    request = _Request(method, quality, preset, layers, dense_steps, num_steps, backend, strict, min_tokens, options)
    if method == grafting.BAM:
        return grafting.graft(obj, **request.without_settings())
    requests = _from_recipe(request) if recipe.is_recipe(method) else [request]
    planned = [_plan(target, one) for target in find(obj) for one in requests]
    handle = _install(planned)
    for one in planned:
        if one.advice and any(one.patched is row for row in handle.patches):
            warnings.warn(f"attn_plugins: {one.advice}", stacklevel=2)
    return handle


def patch_as_saved(root: nn.Module, row: Mapping[str, Any]) -> PatchHandle:
    """As `patch`, as a row of saved weights says, which are to be filled in next (pretrained.py)."""
    chosen = functools.partial(is_named, frozenset(row["sites"]))
    request = _Request(
        row["method"], "balanced", None, chosen, row.get("dense_steps"), row.get("num_steps"), "auto", False,
        row.get("min_tokens"), dict(row["options"]),
    )  # fmt: skip
    return _install([_plan(target, request) for target in find(root)])


def unpatch(obj: object, method: str | None = None) -> None:
    """Take patches out of `obj`, the last first: all of them, or those of one method. Exact: see docs/design.md.

    Raises:
        ValueError: there is nothing to take out.
    """
    rows = [(t.root, patched) for t in find(obj) for patched in record.patches_of(t.root)]
    chosen = [(root, patched) for root, patched in rows if method in (None, patched.method)]
    if not chosen:
        held = sorted({patched.method for _, patched in rows})
        what = f"by {method!r} (it is by {', '.join(held)})" if held else "by attn_plugins"
        raise ValueError(f"{type(obj).__name__} is not patched {what}: nothing to take out")
    for root, patched in reversed(chosen):
        record.remove(root, patched)


@contextlib.contextmanager
def patched(obj: object, method: str | Path | Method | None = None, **settings: Any) -> Iterator[PatchHandle]:
    """`with patched(pipe, "gna"): ...`: patched inside the block, as it was before after it."""
    before = {id(row) for target in find(obj) for row in record.patches_of(target.root)}
    handle = patch(obj, method, **settings)
    try:
        yield handle
    finally:
        handle.remove(keep=before)


def summary(obj: object) -> str:
    """The tables of all patches on `obj`, or a line that says there is none."""
    handles: list[PatchHandle] = []
    for target in find(obj):
        for row in record.patches_of(target.root):
            row.handle = row.handle or PatchHandle([(target.root, row)])
            if all(row.handle is not handle for handle in handles):
                handles.append(row.handle)
    return "\n\n".join(handle.summary() for handle in handles) or f"{type(obj).__name__} is not patched"


@dataclasses.dataclass
class _Request:
    """The arguments of `patch`, or a recipe's."""

    method: str | Path | Method | None
    quality: str
    preset: str | None
    layers: Any
    dense_steps: Steps | tuple[Steps, Steps] | None
    num_steps: int | None
    backend: str
    strict: bool
    min_tokens: int | tuple[int, int] | None
    options: dict[str, Any]
    recipe_of: str | None = None
    measured: tuple[int, int] | None = None  # tokens of the grids that the evidence is of

    def without_settings(self) -> dict[str, Any]:
        """The options, of what takes none of the arguments that all methods share.

        Raises:
            ValueError: one of those was given.
        """
        plain = _Request(self.method, "balanced", None, None, None, None, "auto", False, None, self.options)
        given = [
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) != getattr(plain, field.name)
        ]
        if given:
            raise ValueError(f"{given[0]}={getattr(self, given[0])!r}: {self.method!r} takes options of its own alone")
        return self.options


def _from_recipe(request: _Request) -> list[_Request]:
    """The requests that a recipe file stands for; what the caller gave besides wins.

    Raises:
        ValueError: options or layers of the caller's own for a file of several patches: they would be of all of them.
    """
    assert isinstance(request.method, (str, Path))  # recipe.is_recipe
    saved = recipe.read(request.method)
    if len(saved.rows) > 1 and (request.options or request.layers is not None):
        given = next(iter(request.options), "layers")
        raise ValueError(f"{given}=...: {request.method} is {len(saved.rows)} patches; change it in the file")
    return [_from_row(request, row, saved.tokens) for row in saved.rows]


def _from_row(request: _Request, row: Mapping[str, Any], tokens: tuple[int, int] | None) -> _Request:
    def given(name: str, otherwise: Any = None) -> Any:
        value = getattr(request, name)
        return row.get(name, otherwise) if value is None else value

    names = frozenset(row.get("sites", ()))
    return dataclasses.replace(
        request,
        method=row["method"],
        layers=functools.partial(is_named, names) if names and request.layers is None else request.layers,
        dense_steps=given("dense_steps", 0),
        num_steps=given("num_steps"),
        min_tokens=given("min_tokens", 0),
        options={**row.get("options", {}), **request.options},
        recipe_of=row.get("family", ""),
        measured=tokens,
    )


def is_named(names: frozenset[str], site: Site) -> bool:
    """`layers` of a patch that takes the sites of these names."""
    return site.name in names


class _Planned(NamedTuple):
    """What patching one target will be, what makes the weights of its layers, by name, what the method says to it."""

    target: Target
    patched: Patched
    weights: dict[str, weights.Make]
    advice: str | None


def _plan(target: Target, request: _Request) -> _Planned:
    """What patching one target will be; changes nothing."""
    from attn_plugins import presets

    root, family, _ = target
    warn_if_untested(family.library)
    if request.recipe_of and request.recipe_of != family.name:
        raise ValueError(
            f"the recipe is for models of {request.recipe_of!r}; {type(root).__name__} is of {family.name!r}"
        )
    asked = request.method
    method = asked if isinstance(asked, Method) else registry.method(str(asked or _recommended(target)))
    if method.needs_references and "references" not in family.extras:
        raise ValueError(
            f"{method.name!r} merges the reference images of an IP-Adapter, which is not known for {family.title}: "
            "it is for pipelines of Stable Diffusion 1.5 and XL, and of FLUX.1"
        )
    if method.needs_prompts and "prompts" not in family.extras:
        known = ", ".join(row.title for row in registry.families() if "prompts" in row.extras)
        raise ValueError(
            f"{method.name!r} puts prompts beside a model's text, which is not known for {family.title}: it is for "
            f"{known}"
        )
    chosen = None
    settled = request.recipe_of is not None or request.options.keys() & method.own_settings
    if not settled or request.preset is not None:
        chosen = presets.resolve(method.name, family.name, root, request.quality, request.preset)
    options = {**chosen.options, **request.options} if chosen else request.options
    layers = chosen.layers if chosen and request.layers is None else request.layers
    dense_steps = request.dense_steps if request.dense_steps is not None else chosen.dense_steps if chosen else 0
    min_tokens = request.min_tokens
    if min_tokens is None:
        least = (chosen.min_tokens if chosen else 0) or family.extras.get("min_tokens", 0)
        if method.needs_references or method.needs_prompts:
            least = 0  # an adapter, and the text, is in every layer
        min_tokens = max(least, method.min_tokens[0]), max(least, method.min_tokens[1])
    config = _config(method, options, request.backend)
    schedule = Schedule(dense_steps, request.num_steps)
    clock = _clock(target, schedule)

    state = RootState(
        schedule, clock=clock, strict=request.strict, min_tokens=min_tokens,
        key_padding=bool(family.extras.get("key_padding")), in_parts=bool(family.extras.get("in_parts")),
        measured=request.measured or (chosen.measured_tokens if chosen and not request.options else None),
    )  # fmt: skip
    all_sites = family.find_sites(root)
    if method.needs_references:
        all_sites = family.extras["references"].sites(all_sites)
    sites, skipped = select(method, family, all_sites, layers)
    shapes = weights.shapes(method, family, root, sites)
    if shapes:
        config = method.settled(config, [(site.kind, shapes[site.name]) for site in sites])
    plan = Patched(method.name, family.name, config, state, [], skipped, chosen.name if chosen else None)
    counts = {kind: sum(site.kind == kind for site in all_sites) for kind in method.sites}
    for site in sites:
        processor = method.processor(config, site.index, counts[site.kind], site.kind)
        if processor is None:
            plan.skipped.append((site.name, "the method leaves this layer dense"))
        else:
            plan.layers.append(Layer(state, processor, site.kind, site.name, site.index))
    if not plan.layers:
        raise ValueError(f"{method.name!r} with {config} leaves every site of {family.title} dense: zero sites")
    prepared = None
    if method.needs_references:
        prepared = family.extras["references"].prepare(root, family, target.pipe, plan.layers)
    if method.needs_prompts:
        state.prompts = family.extras["prompts"].prepare(root, family, target.pipe, plan.layers)
    names = {layer.name for layer in plan.layers}
    chosen_sites = [site for site in sites if site.name in names]
    plan.kept = bool(shapes)
    made = prepared or weights.of_sites(method, config, chosen_sites, shapes)
    return _Planned(target, plan, made, method.advice(config))


def _recommended(target: Target) -> str:
    from attn_plugins import presets

    name = presets.recommend(target.family.name, target.root)
    if name is None:
        raise ValueError(
            f"no preset recommends a method for this {target.family.title} ({type(target.root).__name__}); "
            f"name one: {', '.join(registry.method_names())}"
        )
    return name


def _config(method: Method, options: dict[str, Any], backend: str) -> MethodConfig:
    fields = {field.name for field in dataclasses.fields(method.config_class)}
    if "backend" in fields:
        options = {"backend": backend, **options} if backend != "auto" else options
    elif backend != "auto":
        raise ValueError(f"backend={backend!r}: method {method.name!r} has no choice of backends")
    return method.config_class.from_options(**options)


def _clock(target: Target, schedule: Schedule) -> StepClock | None:
    if target.family.library != "diffusers":
        if not schedule.always_sparse:
            raise ValueError(f"dense_steps={schedule.dense_steps}: {target.family.title} has no schedule of steps")
        return None
    if not schedule.always_sparse and getattr(target.pipe, "scheduler", None) is None:
        schedule.is_dense(0, None)  # a share of an unknown length is an error now, not in the first forward
    return StepClock(target.pipe, rises=bool(target.family.extras.get("time_rises")))


def _install(planned: list[_Planned]) -> PatchHandle:
    """All of it or nothing."""
    rows: list[tuple[nn.Module, Patched]] = []
    new: list[_Planned] = []
    for one in planned:
        target, plan = one.target, one.patched
        existing = next((row for row in record.patches_of(target.root) if row.same_as(plan)), None)
        if existing is None:
            _refuse_taken_sites(target, plan)
            new.append(one)
        elif target.pipe is not None and isinstance(existing.state.clock, StepClock):
            existing.state.clock.add(target.pipe)
        rows.append((target.root, existing or plan))
    done: list[tuple[nn.Module, Patched]] = []
    try:
        for target, plan, made, _ in new:
            by_name = {layer.name: layer for layer in plan.layers}
            sites = [site for site in target.family.find_sites(target.root) if site.name in by_name]
            layers = [(site, by_name[site.name]) for site in sites]
            plan.undo = target.family.interception.install(target.root, target.family, plan.state, layers)
            record.add(target.root, plan)
            done.append((target.root, plan))
            weights.attach(target.root, plan, made)
    except BaseException:
        for root, plan in reversed(done):
            record.remove(root, plan)
        raise
    handle = rows[0][1].handle
    if handle is None or [id(row) for row in handle.patches] != [id(row) for _, row in rows]:
        handle = PatchHandle(rows)
    for _, row in rows:
        row.handle = handle
    return handle


def _refuse_taken_sites(target: Target, plan: Patched) -> None:
    wanted = {layer.name for layer in plan.layers}
    for site in target.family.find_sites(target.root):
        if site.name in wanted and SITE_ATTRIBUTE in site.module.__dict__:
            other = record.holder(target.root, site.name) or "another patch"
            raise ValueError(
                f"site {site.name!r} of {type(target.root).__name__} is held by method {other!r} with other settings: "
                f"call attn_plugins.unpatch(obj, {other!r}) first, or choose other layers"
            )
