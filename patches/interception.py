"""Between a diffusers attention module and its q, k, v: the class of its processor is swapped in place.

One generated, stateless subclass stands in for each original processor class. Its `__call__` runs the original's code
with two of its globals rebound, `dispatch_attention_fn` and `F`, so that q, k and v arrive here after projection, norm
and rotation, in every family. What a layer does hangs on the attention module; the running layer is per thread.
Classes must stay one per original class: per layer, they cost a graph each under `torch.compile`.
"""

from __future__ import annotations

import functools
import importlib
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional

from attn_plugins.method import AttentionCall
from attn_plugins.patches import context_parallel
from attn_plugins.patches.plain_tokens import PlainTokens, rotation_of
from attn_plugins.runtime import Layer

STATE = "_attn_plugins"
ORIGINAL = "_attn_plugins_original"
_DISPATCH, _SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"


class _Running(threading.local):
    """The layer whose processor runs in this thread. Set in `__init__`: compiled code guards on instance attributes,
    and one that only the class has would fail the first graph's guard on its second call."""

    def __init__(self) -> None:
        self.layer: Layer | None = None
        self.weights: Any = None
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.plain: PlainTokens | None = None


_running = _Running()
_classes: dict[type, type] = {}


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, dropout: float, causal: bool, scale: float | None,
    first_head: int = 0, layer_heads: int | None = None,
) -> torch.Tensor | None:  # fmt: skip
    """(B, H, N, D) of the running layer's method, or None: stay with the original."""
    layer = _running.layer
    if layer is None:
        return None
    root = layer.root
    moment = root.moment
    if moment.dense:
        return None
    if root.shared_heads is not None:
        share, shares = root.shared_heads
        first_head, layer_heads = share * query.shape[1], shares * query.shape[1]
    if root.key_padding and layer.on_grid and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        mask = None  # it is in the sequence's valid lengths
    call = AttentionCall(
        query, key, value, layer.kind, moment.sequence, scale, mask, causal, dropout,
        first_head=first_head, layer_heads=layer_heads, plain=_running.plain if layer.wants_plain else None,
        weights=_running.weights, prepared=layer.prepared, watch=layer.watch, parts=moment.parts,
    )  # fmt: skip
    if layer.wants_inputs:
        assert _running.inputs is not None  # set with the layer
        call.extras["args"], call.extras["kwargs"] = _running.inputs
    return layer.attend(call)


def catch_q(norm: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """Before a layer's `norm_q`: keeps what enters it, for methods that pool it."""
    if _running.plain is not None:
        _running.plain.found["q"] = norm, args[0]


def catch_k(norm: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """`catch_q` of `norm_k`."""
    if _running.plain is not None:
        _running.plain.found["k"] = norm, args[0]


def asks_for_method() -> bool:
    """Whether an attention runs in this thread whose method is wanted in this step."""
    layer = _running.layer
    return layer is not None and not layer.root.moment.dense


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
    """(B, H, N, D) of the running layer's method, or None, without a mask: for attention that stands elsewhere."""
    return _attend(query, key, value, None, 0.0, False, None)


def _dispatch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, attention_kwargs: dict[str, Any] | None = None, *,
    backend: Any = None, parallel_config: Any = None,
) -> torch.Tensor:  # fmt: skip
    """diffusers' dispatcher, (B, N, H, D): the method where it takes the call, else the user's own backend."""
    from diffusers.models import attention_dispatch

    layer = _running.layer
    if layer is not None and not layer.root.moment.dense:
        if attention_kwargs:
            layer.root.refuse(f"the model passes {', '.join(attention_kwargs)} to its own attention backend")
        elif parallel_config is not None:
            out = _attend_together(layer, query, key, value, attn_mask, dropout_p, is_causal, scale, parallel_config)
            if out is not None:
                return out
        else:
            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            out = _attend(q, k, v, attn_mask, dropout_p, is_causal, scale)
            if out is not None:
                return out.transpose(1, 2)
    return attention_dispatch.dispatch_attention_fn(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
        backend=backend, parallel_config=parallel_config,
    )  # fmt: skip


def _attend_together(
    layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, dropout: float, causal: bool, scale: float | None, parallel_config: Any,
) -> torch.Tensor | None:  # fmt: skip
    """(B, tokens held here, H, D) of the method, which sees all tokens and some heads, or None."""
    root = layer.root
    if isinstance(root.text_apart, str):
        root.refuse(root.text_apart)
        return None
    if layer.wants_inputs or layer.prepares:
        root.refuse("context parallelism: the method reads the layer's input, of which each device holds a part")
        return None
    if _running.plain is not None and _running.plain.found:
        root.refuse("context parallelism: the method pools what enters the layer, of which each device holds a part")
        return None
    found = context_parallel.exchange(parallel_config, query, key, root.moment.sequence, bool(root.text_apart))
    if isinstance(found, str):
        root.refuse(found)
        return None
    q, k, v = (found.gather(t) for t in (query, key, value))
    out = _attend(q, k, v, mask, dropout, causal, scale, found.first_head, query.shape[2])
    return None if out is None else found.scatter(out)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention`, (B, H, N, D), for processors that call it themselves."""
    if query.ndim == 4:
        out = _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if out is not None:
            return out
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _adapter_dispatch(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """For IP-Adapter's processors: beside the layer's own call they make one for the image prompt: it stays dense."""
    from diffusers.models import attention_dispatch

    if query.shape[1] != key.shape[1] and _running.layer is not None and _running.layer.on_grid:
        return attention_dispatch.dispatch_attention_fn(query, key, *args, **kwargs)
    return _dispatch(query, key, *args, **kwargs)


def _adapter_sdpa(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`_adapter_dispatch` for (B, H, N, D)."""
    if query.shape[2] != key.shape[2] and _running.layer is not None and _running.layer.on_grid:
        return torch.nn.functional.scaled_dot_product_attention(query, key, *args, **kwargs)
    return _sdpa(query, key, *args, **kwargs)


class Functional:
    """`torch.nn.functional` with our attention in it."""

    def __init__(self, sdpa: Callable[..., torch.Tensor]) -> None:
        self.scaled_dot_product_attention = sdpa

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def _flux2_cached(*args: Any, **kwargs: Any) -> torch.Tensor:
    from attn_plugins.patches import cached_references

    return cached_references.attend(*args, **kwargs)


_OVERRIDES = {_DISPATCH: _dispatch, "F": Functional(_sdpa), "_flux2_kv_causal_attention": _flux2_cached}
_ADAPTERS = {_DISPATCH: _adapter_dispatch, "F": Functional(_adapter_sdpa)}
# processors of diffusers that make a mask of what the sequence tells: the module whose `call` runs in their place
_LEAN = {"HunyuanVideo15AttnProcessor2_0": "attn_plugins.patches.processors.hunyuan_video15"}


def _names(code: types.CodeType) -> set[str]:
    """All global and attribute names in a function and the functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def why_not(cls: type) -> str | None:
    """Why processors of this class cannot be got between, or None."""
    call = cls.__call__
    if not isinstance(call, types.FunctionType) or hasattr(call, "__wrapped__"):
        return "its __call__ is not a plain function"
    names = _names(call.__code__)
    through_f = _SDPA in names and "F" in names and call.__globals__.get("F") is torch.nn.functional
    if not through_f and not (_DISPATCH in names and _DISPATCH in call.__globals__):
        return "its __call__ calls neither dispatch_attention_fn nor F.scaled_dot_product_attention"
    return None


def intercepted(cls: type) -> type:
    """The stand-in for processor class `cls`.

    Raises:
        TypeError: a class that cannot be got between; the message says why.
    """
    if ORIGINAL in cls.__dict__:
        return cls
    reason = why_not(cls)
    if reason is not None:
        raise TypeError(
            f"attention processor {cls.__module__}.{cls.__qualname__} cannot be patched: {reason}. "
            "Set one of the library's PyTorch 2 processors first (model.set_default_attn_processor() or "
            "model.set_attn_processor(...))"
        )
    new = _classes.get(cls)
    if new is None:
        new = _classes.setdefault(cls, _generate(cls))
        _keep_layer_skip_working(cls, new)
    return new


def _generate(cls: type) -> type:
    original: Callable[..., Any] = cls.__call__
    lean = _LEAN.get(cls.__name__) if cls.__module__.startswith("diffusers.") else None
    overrides = {**_OVERRIDES, **_ADAPTERS} if "IPAdapter" in cls.__name__ else _OVERRIDES
    inner = rebound(importlib.import_module(lean).call if lean else original, overrides)
    rotation = rotation_of(cls, original)

    @functools.wraps(original)  # diffusers filters keyword arguments by this signature
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        layer = attn.__dict__.get(STATE)
        if layer is None:
            return original(self, attn, *args, **kwargs)
        before, before_inputs, before_plain = _running.layer, _running.inputs, _running.plain
        before_weights = _running.weights
        _running.layer, _running.weights = layer, layer.weights_of(attn)
        if layer.wants_inputs:
            _running.inputs = (args, kwargs)
        if layer.wants_plain and rotation is not None:
            _running.plain = PlainTokens(rotation, rotation.tables(args, kwargs))
        try:
            return inner(self, attn, *args, **kwargs)
        finally:
            _running.layer, _running.weights = before, before_weights
            if layer.wants_inputs:
                _running.inputs = before_inputs
            if layer.wants_plain:
                _running.plain = before_plain

    def reduce(self: Any, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _revive, (cls,), state

    body = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        ORIGINAL: cls,
    }
    return type(cls.__name__, (cls,), body)


def rebound(function: Callable[..., Any], overrides: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a plain function with some of its globals replaced: the code is the original's."""
    assert isinstance(function, types.FunctionType)  # why_not refuses the rest
    names = dict(function.__globals__)
    names.update({name: value for name, value in overrides.items() if name in names})
    names.pop("__name__", None)  # with it, Dynamo guards on the real module's globals instead of these
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _revive(cls: type) -> Any:
    """An empty processor of the stand-in class (pickle and deepcopy cannot find a generated class by its name)."""
    new = intercepted(cls)
    return object.__new__(new)


def _keep_layer_skip_working(cls: type, new: type) -> None:
    """diffusers' LayerSkip looks processors up by exact class: the stand-in gets the original's entry."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry as registry
    except ImportError:
        return
    registry._register()
    if cls in registry._registry:
        registry._registry[new] = registry._registry[cls]
