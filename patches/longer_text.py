"""Methods that put prompts of their own beside a model's text: the text of each call is made longer.

So all that a model does to its text, projections, norms, a text stream of its own, it does to the prompts too, and a
layer's keys are those of all of them. Which token sees which is told apart where attention is computed; therefore every
layer that sees the text must be the method's, and a call that cannot be is left as it was, before the text is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins.patches.family import Family, SequenceReader, Undo
from attn_plugins.patches.grids.arguments import argument, replaced
from attn_plugins.patches.guidance import CONTEXT, NamedHalves, check_guides, conditional_items
from attn_plugins.patches.interception import ORIGINAL
from attn_plugins.patches.prompts import check_encodes, encode_prompts
from attn_plugins.prompts import PromptProcessor, Prompts, TextParts
from attn_plugins.runtime import Layer, RootState

TEXT = "encoder_hidden_states"
_MASK = "encoder_attention_mask"


@dataclass(frozen=True)
class LongerText:
    """`prompts` of a family: its models take text (B, L, C) as `encoder_hidden_states`.

    ids: the argument that has the positions of the text's tokens, (L, axes), where there is one.
    """

    ids: str | None = None

    def prepare(self, root: nn.Module, family: Family, pipe: object, layers: Sequence[Layer]) -> AddedPrompts:
        """Before a patch: encodes the prompts.

        Raises:
            ValueError: prompts that cannot be encoded, layers that see the text and are not among `layers`, or a model
                that takes pictures and text as one.
        """
        processor = next(layer.processor for layer in layers)
        assert isinstance(processor, PromptProcessor)  # patching asks for methods that need prompts
        held = {layer.name for layer in layers}
        sites = [site for site in family.find_sites(root) if site.kind in ("cross", "joint")]
        missing = [site.name for site in sites if site.name not in held]
        if missing:
            raise ValueError(
                f"layers=... leaves out {missing[0]!r} and {len(missing) - 1} more that see the text: it holds the "
                "prompts of all regions, which patched layers alone tell apart. Only self-attention may be left out"
            )
        if any(getattr(site.module, "add_k_proj", None) is not None for site in sites if site.kind == "cross"):
            raise ValueError(
                f"this {type(root).__name__} takes the tokens of a picture before 512 of text, so its text cannot be "
                "longer: regions are for the text-to-video models"
            )
        check_guides(pipe, processor.prompts.guidance)
        rows = _encoded(pipe, processor.prompts)
        joint = any(site.kind == "joint" for site in sites)
        return AddedPrompts(processor.prompts, rows, self.ids, [site.module for site in sites], joint)


def _encoded(pipe: Any, prompts: Prompts) -> list[torch.Tensor]:
    """(L, C) of each prompt."""
    words = [prompt for prompt in prompts.prompts if isinstance(prompt, str)]
    rows: list[torch.Tensor] = []
    if words:
        check_encodes(pipe, "the prompts of regions", words)
        rows = list(encode_prompts(pipe, words, prompts.max_sequence_length))
    waiting = iter(rows)
    return [next(waiting) if isinstance(prompt, str) else prompt for prompt in prompts.prompts]


class AddedPrompts:
    """The prompts of a patch, and what puts them behind the text of each call."""

    def __init__(
        self, prompts: Prompts, rows: list[torch.Tensor], ids: str | None, modules: list[nn.Module], joint: bool
    ) -> None:
        self.prompts = prompts
        self.rows = rows
        self.ids = ids
        self.modules = modules
        self.joint = joint

    def listen(self, root: nn.Module, read: SequenceReader, state: RootState) -> list[Undo]:
        """Hooks on the root; returns what takes them out. To be called when the patch's own are there."""
        hook = TextHook(self, read, state)
        undo: list[Undo] = [
            root.register_forward_pre_hook(hook.begin, with_kwargs=True, prepend=True).remove,
            root.register_forward_pre_hook(hook, with_kwargs=True).remove,
        ]
        if hasattr(root, CONTEXT):
            halves = NamedHalves(root, state)
            halves.install()
            undo.append(halves.restore)
        return undo

    def placed(self, like: torch.Tensor) -> list[torch.Tensor]:
        """The prompts where the text is, kept there."""
        first = self.rows[0]
        if first.device != like.device or first.dtype != like.dtype:
            self.rows = [row.to(like.device, like.dtype) for row in self.rows]
        return self.rows

    def longer(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The call with the prompts behind its text.

        Raises:
            ValueError: prompts of another width than the text.
        """
        text = argument(root, args, kwargs, TEXT)
        rows = self.placed(text)
        wrong = next((row.shape[-1] for row in rows if row.shape[-1] != text.shape[-1]), None)
        if wrong is not None:
            raise ValueError(
                f"a region's prompt has {wrong} channels, the text {text.shape[-1]}: patch the pipeline that is "
                "called, or give embeddings as this model takes them"
            )
        whole = torch.cat([text, *(row.expand(len(text), -1, -1) for row in rows)], dim=1)
        args, kwargs = replaced(root, args, kwargs, TEXT, whole)
        ids = None if self.ids is None else argument(root, args, kwargs, self.ids)
        if self.ids is not None and ids is not None:
            ids = ids[0] if ids.ndim == 3 else ids  # of older pipelines
            more = [ids[torch.arange(len(row), device=ids.device).clamp(max=len(ids) - 1)] for row in rows]
            args, kwargs = replaced(root, args, kwargs, self.ids, torch.cat([ids, *more]))
        return args, kwargs


class TextHook:
    """Before each forward of the root: puts the prompts behind its text, or leaves the call dense. Never compiled."""

    def __init__(self, prompts: AddedPrompts, read: SequenceReader, state: RootState) -> None:
        self.prompts = prompts
        self.read = read
        self.state = state

    @torch.compiler.disable(reason="attn_plugins puts prompts behind the text before the model's graph begins")
    def begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before all other hooks: the last call's text is forgotten."""
        self.state.moment.parts = None

    @torch.compiler.disable(reason="attn_plugins puts prompts behind the text before the model's graph begins")
    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        state, moment = self.state, self.state.moment
        if moment.dense:
            return None
        reason = self._unfit(root, args, kwargs)
        if reason is not None:
            moment.dense = True
            if reason:
                state.refuse(reason)
            return None
        text = argument(root, args, kwargs, TEXT)
        items = conditional_items(root, args, kwargs, len(text), self.prompts.prompts.guidance, state)
        if items[0] == items[1]:
            moment.dense = True
            return None
        changed = self.prompts.longer(root, args, kwargs)
        found = self.read(root, *changed)
        if isinstance(found, str):
            state.enter(None, False, found)
        else:
            state.enter(found, False)
        moment.parts = TextParts((text.shape[1], *(len(row) for row in self.prompts.rows)), items)
        return changed

    def _unfit(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why this call must stay as it is; "" where that is no news; None: it need not."""
        moment, text = self.state.moment, argument(root, args, kwargs, TEXT)
        if not isinstance(text, torch.Tensor) or text.ndim != 3:
            return "the call has no text (B, L, C) that prompts could be put behind"
        if argument(root, args, kwargs, _MASK) is not None:
            return f"the call masks its text ({_MASK}), and the regions' prompts have no mask"
        if getattr(root, "_parallel_config", None) is not None:
            return "context parallelism cuts the text, in which the regions' prompts have places"
        for module in self.prompts.modules:
            cls = type(module.processor)
            if ORIGINAL not in cls.__dict__:
                return f"an attention processor was replaced by {cls.__name__}, which would show all prompts to all"
        if self.prompts.joint:
            if moment.sequence is None:
                return moment.reason
            if moment.sequence.tokens < self.state.least_tokens(text.device):
                return ""
        return None
