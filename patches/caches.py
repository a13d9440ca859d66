"""Ring caches in transformers: cache layers that keep what a method's spans reach, and `generate` that uses them.

A cache layer sees neither mask nor positions, and a chunk may overwrite what its first tokens have to see. So `update`
hands the new tokens on (`Pending`), and the attention function attends first and commits then.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticLayer

from attn_plugins.ops.decode.rings import BLOCK, Rings
from attn_plugins.patches.checkpointing import Weakly
from attn_plugins.patches.pending import STRAY, Pending
from attn_plugins.patches.tensor_parallel import share_of_heads
from attn_plugins.runtime import RootState

SLACK = 256  # tokens that a ring which grows has room for, at least, before it grows again
HOOKED = ("generate", "_prepare_cache_for_generation")


class Rule(Protocol):
    """What a method tells of a layer."""

    @property
    def sink(self) -> int: ...
    def spans(self, n: int, heads: int, first: int = 0, among: int | None = None) -> tuple[int, ...]: ...


class RingLayer(CacheLayerMixin):
    """The kept tokens of one layer, as a layer of a transformers cache.

    Args:
        rule: the spans of the layer's heads.
        length: N of the rule: how long the text is to become. A longer one makes the rings grow.
        group: query heads of a KV head, as far as the model's config tells.
        share: this device's share of the heads, and of how many (tensor parallelism).
        room: of a static cache, tokens of its masks; None: a dynamic one.
    """

    is_sliding = False
    is_croppable = False

    def __init__(
        self, rule: Rule, length: int, group: int, share: tuple[int, int] = (0, 1), room: int | None = None
    ) -> None:
        self.rule, self.length, self.group, self.share, self.room = rule, length, group, share, room
        self.is_initialized = False
        self.is_compileable = room is not None
        self.fresh = True  # nothing is kept yet
        self.seen = 0  # tokens so far, padding counted; static caches count on the device
        self.count = torch.zeros((), dtype=torch.int64)
        self.rings: Rings | None = None
        self.capacity = 0  # of a dynamic one: no ring has yet been made for more tokens

    keys = property(lambda self: None if self.rings is None else self.rings.keys)
    values = property(lambda self: None if self.rings is None else self.rings.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values."""
        return 0 if self.rings is None else self.rings.nbytes

    @property
    def written(self) -> int | None:
        """Tokens so far, where the host knows."""
        return self.seen if self.room is None else None

    def _spans(self, kv_heads: int) -> tuple[int, ...]:
        """Of the query heads; as long as no ring wraps, all that there is room for is as good as all."""
        heads = kv_heads * self.group
        spans = self.rule.spans(self.length, heads, self.share[0] * heads, self.share[1] * heads)
        return spans if self.room is not None else tuple(min(span, self.capacity) for span in spans)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rings = Rings(self._spans(key_states.shape[1]), self.rule.sink, key_states, value_states)
        self.count = self.count.to(self.device)
        if self.room is not None:
            self.rings.by_item()  # a mask always tells, item by item
            if not torch.compiler.is_compiling():  # graphs may write to them where they are
                held = (self.rings.keys, self.rings.values, self.rings.positions, self.rings.gaps, self.count)
                for tensor in held:
                    torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "a ring cache keeps no gradients: run under torch.no_grad(), or train with use_cache=False"
            )
        if self.room is None:
            self._hold(self.seen + key_states.shape[2])
        return Pending(key_states, self), Pending(value_states, self)

    def ready(self, heads: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make the rings, at the first call, for `heads` query heads."""
        group = heads // key.shape[1]
        if not self.is_initialized or group != self.group:
            self.group = group
            self.lazy_initialization(key, value)

    def commit(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor | int, real: torch.Tensor | None
    ) -> None:
        """Take the new tokens in, after what they had to see was seen (or before, if it is one)."""
        assert self.rings is not None  # `ready` has made them
        self.rings.write(key, value, positions, real)
        if self.room is None:
            self.seen += key.shape[2]
        else:
            self.count.add_(key.shape[2])
        self.fresh = False

    def reserve(self, length: int) -> None:
        """Let the rule's N be `length` at least, the length that the text will reach. What was dropped stays dropped.

        Raises:
            ValueError: a static cache, which cannot grow.
        """
        if length <= self.length:
            return
        if self.room is not None:
            raise ValueError(f"a static ring cache of {self.length} tokens cannot hold {length}: make a new one")
        self.length = length
        self._resize()

    def _hold(self, length: int) -> None:
        """Room for so many tokens, now: a text may end long before N, and rings that hold everything grow with it."""
        if length > self.length:
            self.reserve(max(length, self.length + self.length // 2))
        if length > self.capacity:
            room = length + max(SLACK, length // 8) + self.rule.sink
            self.capacity = -(-room // BLOCK) * BLOCK - self.rule.sink  # every ring begins at a whole block
            self._resize()

    def _resize(self) -> None:
        if self.rings is not None:
            spans = self._spans(len(self.rings.sizes))
            if spans != self.rings.spans:
                self.rings = self.rings.resized(spans)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.seen + query_length if self.room is None else self.room), 0

    def get_seq_length(self) -> Any:
        if self.room is None:
            return self.seen
        return self.count if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1 if self.room is None else self.room

    def reset(self) -> None:
        self.seen, self.fresh = 0, True
        self.count.zero_()
        if self.rings is not None:
            self.rings.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(
                "a ring cache cannot give tokens back: those that the newest have replaced are gone. Where a cache "
                "must be cropped (assisted decoding), pass past_key_values=DynamicCache(config=model.config)"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.rings is not None:
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.rings.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rings is not None:
            items = torch.arange(self.rings.keys.shape[0], device=self.rings.keys.device)
            self.rings.select(items.repeat_interleave(repeats))

    def offload(self) -> None:
        raise RuntimeError(f"ring caches are not offloaded: {STRAY}")

    prefetch = offload


def ring_cache(model: nn.Module, length: int) -> DynamicCache:
    """A cache for a patched model and texts of up to `length` tokens, for loops that do without `generate`.

    Layers whose spans are not patched, or that have a sliding window of their own, keep what they keep anyway.

    Raises:
        ValueError: a model without spans, or a length below 1.
    """
    hook = model.__dict__.get(HOOKED[0])
    if not isinstance(hook, Generation) or length < 1:
        raise ValueError(
            f"{type(model).__name__}, length={length}: give a model patched with spans, and 1 or more tokens"
        )
    cache = DynamicCache(config=model.config)  # type: ignore[attr-defined]
    hook.fill(cache, length)
    return cache


class Generation:
    """Stands in for `generate` of a patched model: it runs the original, which gets ring caches where it makes its own.

    One a root; each patch with spans adds its layers, and the last to go takes it away.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = Weakly(root)
        self.patches: list[tuple[RootState, list[tuple[nn.Module, Rule]]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        moments = [state.moment for state, _ in self.patches]
        before = [moment.length for moment in moments]
        root = self.root.ref()
        try:
            return type(root).generate(root, *args, **kwargs)
        finally:
            for moment, length in zip(moments, before, strict=True):
                moment.length = length

    def prepare(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        """In the place of `_prepare_cache_for_generation`."""
        root = self.root.ref()
        given = model_kwargs.get("past_key_values")
        type(root)._prepare_cache_for_generation(
            root, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
        )
        length = max_cache_length + 1  # the last token is generated, and not read again
        cache = model_kwargs.get("past_key_values")
        if given is not None:
            held = model_kwargs.get("attention_mask")
            known = held.shape[1] if held is not None else getattr(generation_config, "_mask_length", 0) or 0
            length = max(length, known + (generation_config.max_new_tokens or 0))
            for layer in getattr(given, "layers", ()):
                if isinstance(layer, RingLayer):
                    layer.reserve(length)
        for state, _ in self.patches:
            state.moment.length = length
        crops = generation_config.is_assistant or "assisted" in str(getattr(generation_mode, "value", generation_mode))
        if given is None and not crops and isinstance(cache, Cache) and not getattr(cache, "offloading", False):
            self.fill(cache, length)

    def fill(self, cache: Cache, length: int) -> None:
        """Put ring layers in the places of those that would keep all tokens."""
        for _, layers in self.patches:
            for module, rule in layers:
                index = getattr(module, "layer_idx", None)
                if index is None or index >= len(cache.layers):
                    continue
                old = cache.layers[index]
                room = old.max_cache_len if type(old) is StaticLayer else None
                if room is None and type(old) is not DynamicLayer:
                    continue
                made = RingLayer(
                    rule, length, getattr(module, "num_key_value_groups", 1), share_of_heads(module) or (0, 1), room
                )
                if old.is_initialized and room is not None:  # a graph will take the prompt in, and can make nothing
                    made.lazy_initialization(old.keys[:, :, :0], old.values[:, :, :0])
                cache.layers[index] = made


def install(
    root: nn.Module, state: RootState, layers: Sequence[tuple[nn.Module, Any]]
) -> list[functools.partial[None]]:
    """Check that the rules are for this model, and let its `generate` keep rings. Returns what undoes it.

    `layers`: (attention module, processor); those without a rule of spans are left out.

    Raises:
        ValueError: a plan for a model of another shape.
    """
    ours = [(module, processor) for module, processor in layers if hasattr(processor, "span_rule")]
    for module, processor in ours:
        processor.fits(module.config)
    if not ours or not hasattr(type(root), HOOKED[1]):
        return []
    hook = root.__dict__.get(HOOKED[0])
    if not isinstance(hook, Generation):
        if any(name in root.__dict__ for name in HOOKED):
            raise TypeError(f"{type(root).__name__} has a generate of its own on the instance: patch it before that")
        hook = Generation(root)
        root.__dict__[HOOKED[0]], root.__dict__[HOOKED[1]] = hook, hook.prepare
    hook.patches.append((state, [(module, processor.span_rule) for module, processor in ours]))
    return [functools.partial(_withdraw, root, state)]


def _withdraw(root: nn.Module, state: RootState) -> None:
    hook = root.__dict__.get(HOOKED[0])
    if not isinstance(hook, Generation):
        return
    hook.patches = [row for row in hook.patches if row[0] is not state]
    if not hook.patches:
        for name in HOOKED:
            root.__dict__.pop(name, None)


def note_foreign(state: RootState, cache: Any) -> None:
    """Say once that a cache that was passed keeps all tokens, when it is used."""
    if not isinstance(cache, Cache) or NOTE in state.warned:
        return
    if any(isinstance(layer, RingLayer) for layer in cache.layers) or all(cache.is_sliding) or not cache.is_initialized:
        return
    state.warned.add(NOTE)
    warnings.warn(f"attn_plugins: {NOTE}", stacklevel=4)


NOTE = (
    "the cache that was passed keeps all tokens: spans are honoured, no memory is saved. Leave past_key_values to "
    "generate(), or make one with attn_plugins.patches.caches.ring_cache(model, length)"
)
