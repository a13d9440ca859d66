"""The methods of the registry for a server that asks for one function: vLLM-Omni's sparse attention contract.

    fn(query, key, value, params, is_causal, softmax_scale) -> output          (B, N, H, D) all four

vLLM-Omni's `SPARSE_ATTN` backend finds the function by name among the entry points of the group "vllm_omni.sparse_attn"
and calls it for the self-attention of its diffusion models; this package announces `attend` there as "attn_plugins".
`params` is one flat dict: what the operator of the server configured, what the framework knows of this forward (step,
latent shape), what the model adds. Unknown keys are not ours and are ignored, so settings of the method stand by
themselves in `options`, where an unknown one is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from attn_plugins import registry
from attn_plugins.method import AttentionCall, SiteKind
from attn_plugins.runtime import Layer, RootState
from attn_plugins.schedule import Schedule
from attn_plugins.sequence import Sequence

ENTRY_POINTS = "vllm_omni.sparse_attn"
LAYERS = 12  # of a model of which nothing is known
NO_GRID = "the server tells no token grid: set grid=[T, H, W] in the params (one of them may be -1)"
# Tensor -> (its version, its values): one wait for the device, not one per layer.
_read: Any = WeakTensorKeyDictionary()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: Mapping[str, Any] | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """One self-attention by a method of the registry; query (B, N, H, D), key and value (B, N, H_kv, D).

    Args:
        params: ours are `method` ("gna"), `options` (a dict, the method's own), `dense_steps` and `num_steps` (as in
            `patch`), `grid` (tokens per axis; one may be -1), `text_before` and `text_after` (tokens around the grid),
            `layer` (index and count, for methods that differ from layer to layer) and `strict`. The framework's are
            `denoise_step_idx` and `total_denoise_steps` (one per item, or ints), `latent_shape` and `patch_size` (one
            row per item), of which the grid is made where none is given.
        is_causal: of the model; most methods run such calls dense.
        softmax_scale: None is D ** -0.5.

    Returns:
        (B, N, H, D): of the method, or of plain attention where the step is dense or the method refuses the call (one
        warning says why; with `strict`, an error).

    Raises:
        ValueError: unknown method, illegal settings, settings per head (a server does not say which it asks for).
        TypeError: an unknown option.
        Refused: see `strict`.
    """
    params = params or {}
    layer = _layer(
        str(params.get("method", "gna")),
        _frozen(params.get("options") or {}),
        Schedule(params.get("dense_steps", 0), params.get("num_steps")),
        tuple(_ints(params.get("layer"))),
        bool(params.get("strict", False)),
    )
    root = layer.root
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    sequence = None if _is_dense(root.schedule, params) else _sequence(params, query.shape[1])
    if isinstance(sequence, Sequence):
        out = layer.attend(AttentionCall(q, k, v, layer.kind, sequence, softmax_scale, causal=is_causal))
        if out is not None:
            return out.transpose(1, 2)
    elif sequence is not None:
        root.refuse(sequence)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=softmax_scale, enable_gqa=grouped)
    return out.transpose(1, 2)


# Masks and spans change the result; without a word here, the server raises rather than pass one.
attend.capabilities = {"supports_attention_mask": False, "supports_full_attn_spans": False}  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _layer(
    method_name: str, options: tuple[tuple[str, Any], ...], schedule: Schedule, place: tuple[int, ...], strict: bool
) -> Layer:
    """One layer for equal settings: there is no module to hang it on."""
    method = registry.method(method_name)
    kind: SiteKind = "joint" if "joint" in method.sites else "self"
    if method.kind == "module" or kind not in method.sites:
        raise ValueError(f"method {method_name!r} is none for q, k and v of a denoiser's self-attention")
    config = method.config_class.from_options(**dict(options))
    if getattr(config, "per_head", ()):
        raise ValueError("per_head: a server does not say which heads it asks for; leave it out")
    if not place:
        place = 0, LAYERS
        if len({id(method.processor(config, index, LAYERS, kind)) for index in range(LAYERS)}) > 1:
            raise ValueError(f"method {method_name!r} differs from layer to layer here: give layer=[index, count]")
    if len(place) != 2 or not 0 <= place[0] < place[1]:
        raise ValueError(f"layer={list(place)}: give the index, from 0, and the count of the layers")
    processor = method.processor(config, *place, kind)
    if processor is None:
        raise ValueError(f"method {method_name!r} with {config} leaves layer {place[0]} dense: nothing to serve")
    if getattr(processor, "wants_inputs", False):
        raise ValueError(f"method {method_name!r} reads the layer's input: a server hands over q, k and v alone")
    return Layer(RootState(schedule, strict=strict), processor, kind, "served", place[0])


def _frozen(options: Any) -> tuple[tuple[str, Any], ...]:
    """Options as the key of a cache, whatever lists they hold."""

    def freeze(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple((key, freeze(item)) for key, item in value.items())
        return tuple(freeze(item) for item in value) if isinstance(value, (list, tuple)) else value

    if not isinstance(options, Mapping):
        raise ValueError(f"options={options!r}: give the method's settings as a dict")
    return tuple(sorted((key, freeze(value)) for key, value in options.items()))


def _is_dense(schedule: Schedule, params: Mapping[str, Any]) -> bool:
    """Whether any item of the batch is at a dense step."""
    if schedule.always_sparse:
        return False
    steps, totals = (_ints(params.get(name)) for name in ("denoise_step_idx", "total_denoise_steps"))
    if not steps:
        raise ValueError(f"dense_steps={schedule.dense_steps}: the server tells no denoise_step_idx; leave it out")
    lengths: list[int | None] = [*totals] or [None]
    return any(schedule.is_dense(step, lengths[min(item, len(lengths) - 1)]) for item, step in enumerate(steps))


def _sequence(params: Mapping[str, Any], tokens: int) -> Sequence | str:
    """What `tokens` tokens are made of, or why that cannot be told."""
    before, after = (int(params.get(name, 0)) for name in ("text_before", "text_after"))
    grid = _grid(params, tokens - before - after)
    if isinstance(grid, str):
        return grid
    sequence = Sequence(grid, before, after)
    if sequence.length != tokens:
        return f"{before} + {'x'.join(map(str, grid))} + {after} tokens make {sequence.length}, and there are {tokens}"
    return sequence


def _grid(params: Mapping[str, Any], tokens: int) -> tuple[int, ...] | str:
    given = params.get("grid")
    if given is not None:
        grid = [int(size) for size in given]
        if grid.count(-1) == 1:
            known = -functools.reduce(lambda a, b: a * b, grid, 1)
            grid[grid.index(-1)] = tokens // known if known > 0 else 0
        if not 1 <= len(grid) <= 3 or min(grid) < 1:
            return f"grid={list(given)} is none of {tokens} tokens: give one to three sizes, one of them may be -1"
        return tuple(grid)
    shape, patch = (_rows(params.get(name)) for name in ("latent_shape", "patch_size"))
    if not shape or not patch:
        return NO_GRID
    if len({tuple(row) for row in shape}) > 1:
        return f"a batch of different latent shapes {shape}: one grid is for all"
    return tuple(-(-size // step) for size, step in zip(shape[0], patch[0], strict=True))


def _values(value: Any) -> Any:
    """Numbers, in lists if there are several."""
    if not isinstance(value, torch.Tensor):
        return value
    found = _read.get(value)
    if found is None or found[0] != value._version:
        found = _read[value] = (value._version, value.tolist())
    return found[1]


def _ints(value: Any) -> list[int]:
    """One number, or one per item."""
    value = _values(value)
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]


def _rows(value: Any) -> list[list[int]]:
    """(T, H, W) of all, or one row per item."""
    value = _values(value)
    if not value:
        return []
    return [list(row) for row in value] if isinstance(value[0], (list, tuple)) else [list(value)]
