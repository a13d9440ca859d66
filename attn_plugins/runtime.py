"""What hangs on a patched model while it runs: a `RootState` per patch of a root, a `Layer` on each attention module.

State belongs to the model, so pipelines that share a transformer share its patch. What changes from call to call (the
sequence, whether this step is dense) is per thread, so two threads may run one model at two resolutions; a checkpoint's
recomputation, which may run in a third thread, gets the moment of its own forward (patches/checkpointing.py).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from attn_plugins.method import AttentionCall, Processor, SiteKind
from attn_plugins.schedule import Schedule
from attn_plugins.sequence import Sequence

Snapshot = tuple["Sequence | None", bool, str, Any]
UNKNOWN = "the token grid of this call is unknown"


class Refused(RuntimeError):
    """A call had to stay dense and the patch was made with strict=True."""


class Clock(Protocol):
    """Tells which step of how many a forward is."""

    def position(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int | None]:
        """(step from 0, length of the schedule or None where nothing tells)."""


class Moment(threading.local):
    """The running call, as seen by one thread. `__init__` runs in each: compiled code guards on instance attributes."""

    def __init__(self) -> None:
        self.sequence: Sequence | None = None
        self.dense = False
        self.reason = UNKNOWN
        self.largest = 0  # tokens of the largest grid of this forward
        self.length: int | None = None  # of the text that a running `generate` is to make
        self.prepared: Any = None  # what the running layer's method made of the layer's input
        self.lean = self.served = False  # its queries lack what the method does not read; the method has run
        self.refusal = ""  # why it has not
        self.outer: Snapshot | None = None  # what holds again when a level inside a level ends
        self.parts: Any = None  # of methods that need prompts: the TextParts of this forward's text
        self.half: str | None = None  # what the pipeline calls this call: "cond", "uncond"


class RootState:
    """Shared by all layers of one patch on one root.

    Args:
        schedule: which steps stay dense.
        clock: tells the step; None where the model has no steps (then only a schedule without dense steps makes sense).
        strict: a refusal raises `Refused` instead of a warning.
        min_tokens: calls with a smaller grid stay dense: a choice, worth a word only if it is all of a forward's calls.
            A pair is (on a CPU, on other devices).
        key_padding: the family has turned the model's key padding mask into the sequence's valid lengths.
        in_parts: the model's attention takes its text in calls of its own, which stay dense without a word.
        measured: tokens of the least and the largest grid that the settings were measured at; other sizes get a word.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        clock: Clock | None = None,
        strict: bool = False,
        min_tokens: int | tuple[int, int] = 0,
        key_padding: bool = False,
        in_parts: bool = False,
        measured: tuple[int, int] | None = None,
    ) -> None:
        self.schedule = schedule
        self.clock = clock
        self.strict = strict
        self.min_tokens = _one_or_pair(min_tokens)
        self.key_padding = key_padding
        self.in_parts = in_parts
        self.measured = measured
        self.moment = Moment()
        self.warned: set[str] = set()
        self.text_apart: bool | str | None = None  # how context parallelism cuts: see patches/context_parallel.py
        self.shared_heads: tuple[int, int] | None = None  # this device's share under tensor parallelism, of how many
        self.prompts: Any = None  # of methods that need prompts: see patches/longer_text.py
        self.last_sequence: Sequence | None = None  # of the largest grid; for reports only; any thread's

    def enter(self, sequence: Sequence | None, dense: bool, reason: str = UNKNOWN) -> None:
        """Called at the start of each forward; `reason` says why `sequence` is None."""
        moment = self.moment
        moment.sequence = sequence
        moment.dense = dense
        moment.reason = reason
        moment.prepared = None  # of a layer that an exception has cut short
        if sequence is not None and not torch.compiler.is_compiling():
            moment.largest = max(moment.largest, sequence.tokens)
            if sequence.tokens == moment.largest:
                self.last_sequence = sequence

    def least_tokens(self, device: torch.device) -> int:
        """`min_tokens` on this device."""
        least = self.min_tokens
        return least if isinstance(least, int) else least[device.type != "cpu"]

    def begin_forward(self, root: nn.Module) -> None:
        """Before `enter`, where a root's forward begins: says what the sizes of the last one were wrong for."""
        moment = self.moment
        if moment.largest and self.measured and not self.measured[0] <= moment.largest <= self.measured[1]:
            self._warn_unmeasured(moment.largest, *self.measured)
        least = self.least_tokens(device_of(root)) if moment.largest and self.min_tokens else 0
        if 0 < moment.largest < least:
            self.warn_once(
                f"no grid of the last forward had min_tokens={least} tokens, the largest {moment.largest}; "
                "patch with a smaller min_tokens=... to have it sparse"
            )
        moment.largest = 0

    def is_dense_step(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the schedule keeps this forward dense."""
        if self.schedule.always_sparse or self.clock is None:
            return False
        return self.schedule.is_dense(*self.clock.position(root, args, kwargs))

    def snapshot(self) -> Snapshot:
        moment = self.moment
        return moment.sequence, moment.dense, moment.reason, moment.parts

    @contextlib.contextmanager
    def use(self, snapshot: Snapshot) -> Iterator[None]:
        """Run with the moment of an earlier call: what a checkpoint's recomputation needs."""
        before = self.snapshot()
        moment = self.moment
        moment.sequence, moment.dense, moment.reason, moment.parts = snapshot
        try:
            yield
        finally:
            moment.sequence, moment.dense, moment.reason, moment.parts = before

    def refuse(self, reason: str) -> None:
        """A call stays dense although a method was asked for: say why, once; under `strict` raise.

        Raises:
            Refused: under `strict`, and where the text holds a method's prompts: dense, each would be for all tokens.
        """
        self.moment.refusal = reason
        if self.strict or self.moment.parts is not None:
            why = "strict=True" if self.strict else "its prompts are in the text, so it cannot go on dense"
            raise Refused(f"attn_plugins ({why}): {reason}")
        if torch.compiler.is_compiling():
            _warn_while_compiling(reason)
        else:
            self.warn_once(reason)

    def warn_once(self, reason: str) -> None:
        if torch.compiler.is_compiling() or reason in self.warned:
            return
        self.warned.add(reason)
        _warn(reason)

    def _warn_unmeasured(self, tokens: int, least: int, most: int) -> None:
        sizes = f"{least}" if least == most else f"{least} to {most}"
        reason = f"these settings were measured at grids of {sizes} tokens"
        if not torch.compiler.is_compiling() and reason not in self.warned:
            self.warned.add(reason)
            message = f"attn_plugins: {reason}; this one has {tokens}: what it gains and costs here is not known"
            warnings.warn(message, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "moment"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, moment=Moment())


class Layer:
    """One patched attention module. Compiled code must read nothing here that differs from layer to layer but the
    processor: each distinct value costs a graph."""

    def __init__(self, root: RootState, processor: Processor, kind: SiteKind, name: str, index: int) -> None:
        self.root = root
        self.processor = processor
        self.kind = kind
        self.name = name
        self.index = index
        self.on_grid = kind in ("self", "joint")
        self.cell = 1  # side of the cells in which a grid's tokens come (Qwen-VL's vision): see attention_interface
        # a method that reads the layer's own inputs (routers, tables of rotation) says so on its processor
        self.wants_inputs = bool(getattr(processor, "wants_inputs", False))
        self.wants_plain = processor.wants_plain
        self.prepares = processor.prepares
        self.watch: Any = None  # who is told what a router chose: see training/routers.py
        self.references: Any = None  # its phrases, of methods that merge reference images
        self.weights: str | None = None  # the name of the child that holds the method's weights, if it has any

    def weights_of(self, module: nn.Module) -> nn.Module | None:
        """The method's weights on the layer's module, as they are now: PEFT may have wrapped them."""
        return None if self.weights is None else module._modules.get(self.weights)

    def begin(self, module: nn.Module, x: torch.Tensor | None) -> None:
        """Before the layer's projections, of methods that read its input x: (B, N, C), or a picture (B, C, H, W)."""
        moment = self.root.moment
        moment.prepared, moment.lean, moment.served, moment.refusal = None, False, False, ""
        sequence = moment.sequence if self.on_grid else None
        if x is None or (sequence is not None and sequence.tokens < self.root.least_tokens(x.device)):
            return
        if x.ndim in (3, 4) and not moment.dense:
            rows = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
            moment.prepared = self.processor.prepare(rows, self.weights_of(module))

    @property
    def prepared(self) -> Any:
        """What `Processor.prepare` made of the input of the call that runs in this thread; None outside of one."""
        return self.root.moment.prepared

    def end(self) -> None:
        """After the layer, whatever came of it.

        Raises:
            Refused: it stayed dense, and its queries were not whole (patches/routed_projections.py).
        """
        moment = self.root.moment
        moment.prepared = None
        if moment.lean and not moment.served:
            raise Refused(
                f"{self.name}: skip_projections=True left queries out, and then the layer had to stay dense "
                f"({moment.refusal or 'it was not asked for attention'}): patch with skip_projections=False"
            )

    def attend(self, call: AttentionCall) -> torch.Tensor | None:
        """The method's output (B, H, N, D), or None: run the original attention, with the user's own backend."""
        root = self.root
        if root.moment.dense:
            return None
        if self.on_grid:
            if call.sequence is not None and call.sequence.tokens < root.least_tokens(call.q.device):
                return None
            if root.in_parts and call.sequence is not None and call.k.shape[2] < call.sequence.length:
                return None
            reason = self._misfit(call)
            if reason is not None:
                root.refuse(reason)
                return None
            sequence = call.sequence
            assert sequence is not None  # _misfit refuses calls without one
            if call.q.shape[2] != call.k.shape[2]:  # text gives keys and values, and asks nothing
                call.asks = slice(sequence.text_before, sequence.text_before + sequence.tokens)
                call.q = torch.nn.functional.pad(call.q, (0, 0, sequence.text_before, sequence.text_after))
        reason = self.processor.refuses(call)
        if reason is not None:
            root.refuse(reason)
            return None
        out = self.processor(call)
        root.moment.served = True
        return out if call.asks is None else out[:, :, call.asks]

    def _misfit(self, call: AttentionCall) -> str | None:
        """Why the tokens of this call are not the sequence that the family read, or None. Reads shapes only."""
        sequence = call.sequence
        if sequence is None:
            return self.root.moment.reason
        batch, heads, tokens, _ = call.q.shape
        keys = call.k.shape[2]
        if batch == 1 and tokens == keys and (tokens != sequence.length or sequence.batch not in (None, 1)):
            # item by item, each without its padding (Mochi)
            call.sequence = sequence = sequence.without_padding(tokens) or sequence
        text_asks = not (tokens == sequence.tokens < keys == sequence.length)
        if tokens != sequence.length and text_asks:
            if self.kind == "self" and tokens == sequence.tokens:  # image-only attention beside a joint one (SD 3.5)
                call.sequence = sequence = Sequence(sequence.grid)
            else:
                return (
                    f"{tokens} tokens where the model's {_described(sequence)} make {sequence.length} "
                    "(reference, conditioning or other extra tokens?)"
                )
        if keys != tokens and text_asks:
            return f"{keys} keys beside {tokens} queries: not self-attention"
        if heads % call.k.shape[1]:
            return f"{heads} query heads are no multiple of {call.k.shape[1]} key heads"
        if sequence.batch is not None and sequence.batch != batch:
            return f"a batch of {batch} where the valid lengths are of {sequence.batch} items"
        return None


def device_of(root: nn.Module) -> torch.device:
    """Where a model's first parameter is (a model without any: the CPU)."""
    first = next(root.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _one_or_pair(min_tokens: int | tuple[int, int]) -> int | tuple[int, int]:
    pair = tuple(min_tokens) if isinstance(min_tokens, (list, tuple)) else (min_tokens, min_tokens)
    if len(pair) != 2 or any(isinstance(least, bool) or not isinstance(least, int) or least < 0 for least in pair):
        raise ValueError(f"min_tokens={min_tokens!r}: give a number of tokens, or two: on a CPU and on other devices")
    return pair[0] if pair[0] == pair[1] else pair


def _described(sequence: Sequence) -> str:
    grid = "x".join(map(str, sequence.grid))
    text = sequence.text_before + sequence.text_after
    return f"{text} text + {grid} grid tokens" if text else f"{grid} grid tokens"


def _warn(reason: str) -> None:
    warnings.warn(f"attn_plugins: dense attention used where a method was asked for: {reason}", stacklevel=4)


@torch.compiler.assume_constant_result
def _warn_while_compiling(reason: str) -> bool:
    """Said when the graph is made; a compiled graph says nothing."""
    _warn(reason)
    return True
