"""What a method is: it knows an algorithm and no model.

A `Method` is named, has a frozen config, and bound to a kind of layer it gives a `Processor`: the thing that is called
with q, k, v. A family calls it through `Layer.attend` (runtime.py). Three kinds (see docs/design.md): *sparse* methods
return a block plan, *operator* methods compute something else from q, k, v, *module* methods replace the module.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from attn_plugins.sequence import Sequence

SiteKind = Literal["self", "joint", "cross", "causal"]


@dataclass
class CausalKeys:
    """Where the tokens of a causal call stand, when shapes alone do not tell (padding, a cache with room to spare).

    positions (B, N_kv): of each key in its own item, counted from the item's first real token; negative: not a token.
    first (B,): the position of the first query, counted alike. column (one element): the key slot of the first query.
    Integers on the device of q; their values must not be read on the host.
    """

    positions: torch.Tensor
    first: torch.Tensor
    column: torch.Tensor


class Plain(Protocol):
    """Queries and keys of a layer from before norm and rotation, and how it norms and rotates."""

    def pooled(self, which: Literal["q", "k"], call: AttentionCall, to: tuple[int, ...]) -> torch.Tensor | None:
        """Means over `to` cells an axis of the grid, then normed and rotated at their cells' middle, (B, H, n, D).

        None where it cannot be told.
        """


@dataclass
class AttentionCall:
    """One attention call, as the interception hands it over.

    q (B, H, N, D); k, v (B, H_kv, N_kv, D): after projection, norm and rotation, any strides.
    `sequence` describes the N tokens (None where the family could not tell); `causal` is the original's flag;
    `mask` is what is left of the original's mask after the family has turned key padding into the sequence's valid
    lengths; `extras` holds whatever else the interception saw (hidden_states, rotary tables) for methods that ask.

    Of causal sites: q may be shorter than k (a cache). `keys` None: all keys are real and consecutive, and the last one
    belongs to the last query. `sliding_window`: the model's own rule, a query sees fewer than so many keys back.
    `softcap`: scores are softcap * tanh(scores / softcap). `sinks` (H,): a learned score beside each row's own, which
    takes its share of the softmax and gives nothing.

    `plain`: for processors that ask for it, where the interception knows how the layer norms and rotates. `weights`:
    what `Method.weights` made for the layer; `prepared`: what `Processor.prepare` made of the layer's input in this
    call, None where that was not seen. `watch`: who is to be told what a router chose (training/routers.py), or None.

    `first_head`, `layer_heads`: where other devices have the rest of the heads, the place of q's first one among all of
    the layer's; what a method sets per head is counted among those. `asks`: the rows whose output is read (None: all);
    the others of q are filling.

    `parts`: of methods that need prompts (prompts.py), what the text of this forward is made of.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kind: SiteKind
    sequence: Sequence | None = None
    scale: float | None = None
    mask: torch.Tensor | None = None
    causal: bool = False
    dropout: float = 0.0
    keys: CausalKeys | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    first_head: int = 0
    layer_heads: int | None = None
    asks: slice | None = None
    plain: Plain | None = None
    weights: Any = None
    prepared: Any = None
    watch: Any = None
    parts: Any = None
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class SiteShape:
    """What the weights of a method are made for: a layer's sizes.

    grid: tokens per axis at the size that the model is made for; None, or a sentence why, where it is for any.
    own_tokens: those before the grid (class, distillation, registers). width: channels of the layer's input. kv_heads:
    None: as many as heads. q_norm: the layer norms each head's query by itself. output: name, from the attention module
    on, of the linear layer that its heads go through; None where that is elsewhere.
    """

    heads: int
    head_dim: int
    grid: tuple[int, ...] | str | None = None
    own_tokens: int = 0
    width: int = 0
    kv_heads: int | None = None
    q_norm: bool = False
    output: str | None = None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // (self.kv_heads or self.heads)


@dataclass
class Kept:
    """The keys that some query rows of a call see, in units that are chosen as one: a block, or a single key.

    unit_of (N_kv,) int64: the unit of each key, counted from 0; -1: every row sees it, and nothing chose it (text).
    chosen (B or 1, H or 1, R, units) bool: the units of each row; of their keys it sees those that dense attention
    shows it. Both on the device of q.
    """

    unit_of: torch.Tensor
    chosen: torch.Tensor

    @classmethod
    def on_grid(cls, sequence: Sequence, rows: torch.Tensor, unit_of: torch.Tensor, chosen: torch.Tensor) -> Kept:
        """Of methods that choose among the keys of a grid for the queries of the grid, where text sees all.

        rows (R,), on the host; unit_of (grid tokens,); chosen (B or 1, H or 1, R, units), whatever it says of text.
        """
        device, first = chosen.device, sequence.text_before
        text = ((rows < first) | (rows >= first + sequence.tokens)).to(device)
        ends = (sequence.text_before, sequence.text_after)
        return cls(torch.nn.functional.pad(unit_of.to(device), ends, value=-1), chosen | text[:, None])


@dataclass(frozen=True)
class MethodConfig:
    """Base of the methods' configs: frozen, comparable, made from plain YAML values.

    `binding`: options without which a file's weights mean something else; weights of others are not loaded.
    """

    binding: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_options(cls, **options: Any) -> MethodConfig:
        """A config from keyword options; lists become tuples (YAML knows no tuples).

        Raises:
            TypeError: an unknown option; the message lists the legal ones, nearest first.
        """
        from difflib import get_close_matches

        names = [field.name for field in dataclasses.fields(cls)]
        for option in options:
            if option not in names:
                near = get_close_matches(option, names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise TypeError(f"unknown option {option!r}{hint}; {cls.__name__} takes {', '.join(names)}")
        return cls(**{key: _frozen(value) for key, value in options.items()})

    def to_options(self) -> dict[str, Any]:
        """The options that differ from the defaults, as plain values that YAML can hold."""
        rows = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                rows[field.name] = _plain(value)
        return rows


class Processor(ABC):
    """A method bound to a config: stateless, shared by all layers with an equal config, called per attention call.

    `measure`: what reports call its density. `wants_plain`: it asks calls for `plain`. `prepares`: it reads the layer's
    own input, by `prepare`. `skips_projections`: what it prepares has `gates`, and heads whose gate is 0 need no query,
    and give none of the output.
    """

    measure: str = "density"
    wants_plain: ClassVar[bool] = False
    prepares: bool = False
    skips_projections: bool = False

    def prepare(self, x: torch.Tensor, weights: Any) -> Any:
        """What the call will find as `prepared`: of the layer's input x (B, N, C), before its projections run.

        For those that say `prepares`. Called again in a checkpoint's recomputation. `weights`: as of the call.
        """
        return None

    def refuses(self, call: AttentionCall) -> str | None:
        """Why this call must stay dense (said to the user once), or None. Must not read tensor values."""
        if call.mask is not None:
            return "the model passes an attention mask that this method cannot honour"
        if call.keys is not None or call.sliding_window is not None:
            return "this method cannot honour padded prompts, preallocated caches or the model's own sliding window"
        if call.softcap is not None or call.sinks is not None:
            return "this method cannot honour the model's capped scores or learned sinks"
        if call.dropout:
            return "attention dropout is on"
        return None

    @abstractmethod
    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """The output, (B, H, N, D), in q's memory layout."""

    def density(self, sequence: Sequence) -> float:
        """Share of the dense (query, key) pairs that are computed; of operator methods, of dense attention's cost."""
        return 1.0

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept | None:
        """What the query rows `rows` (R,) int64, on the host, see in a call that this processor has just taken.

        For measuring a run, so it may take its time, but never the room of all rows. None: not a choice of pairs.
        """
        return None


class Method(ABC):
    """A named algorithm. Subclasses set the class variables and `processor`."""

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[Literal["sparse", "operator", "module"]]
    paper: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]]
    sites: ClassVar[frozenset[SiteKind]] = frozenset({"self", "joint"})
    # grids of fewer tokens stay dense unless a person says otherwise, for it would lose: on a CPU, on other devices
    min_tokens: ClassVar[tuple[int, int]] = (0, 0)
    # options by which a person brings a setting of their own: with one of them, and no preset named, no preset is used
    own_settings: ClassVar[frozenset[str]] = frozenset()
    # its processors are `ReferenceProcessor`s (references.py): for models with the images of an image adapter alone
    needs_references: ClassVar[bool] = False
    # its processors are `PromptProcessor`s (prompts.py): for models whose text can be made longer
    needs_prompts: ClassVar[bool] = False
    # of kind "module": its weights are made for the grid of the size that a model is made for
    needs_grid: ClassVar[bool] = False

    @abstractmethod
    def processor(self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind) -> Processor | None:
        """The processor of the layer that is number `layer_index` of `layer_count` of its `kind`; None leaves it dense.

        Equal layers must get the same object: a compiled model needs a graph for each distinct one.
        """

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        """Options worth trying on such a layer where something chooses (`attn-plugins tune`), mild ones first.

        grid: tokens per axis, outermost first; (N,) of a text. Presets are tried besides; (): they alone are.
        """
        return ()

    def on_heads(self, rows: Iterable[tuple[tuple[int, ...], Mapping[str, Any]]]) -> dict[str, Any] | None:
        """Options by which some query heads have their own, (heads, options) a row, and all others are dense.

        None: this method, or one of these settings, cannot say so.
        """
        return None

    def weights(self, config: MethodConfig, shape: SiteShape, layer_index: int) -> torch.nn.Module | None:
        """New weights for a layer, of methods of kind "module": they become a child of the layer, called as the method.

        Must not draw from the global random state. A layer, or a setting, without them: None.
        """
        return None

    def settled(self, config: MethodConfig, sites: list[tuple[SiteKind, SiteShape]]) -> MethodConfig:
        """The config with everything decided that depends on the layers it is for; of methods of kind "module".

        Raises:
            ValueError: a setting that these layers cannot have.
        """
        return config

    def advice(self, config: MethodConfig) -> str | None:
        """What a person who patches without weights from a file should know, or None. Said once a patch."""
        return None


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
