"""diffusers' context parallelism around a method: Ulysses (arXiv 2309.14509), the all-to-all before and after.

Each device holds a stretch of every stream of tokens and all heads. A method needs the whole sequence and does not mind
having only some heads, so the two are exchanged, as diffusers does inside its own backends. What arrives comes device
by device, each with its stretch of the text and its stretch of the picture; here it is put into the order of the
sequence again. Ring attention passes the keys around piece by piece: no method can choose among keys it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins.sequence import Sequence

RING = "ring attention shows a method a part of the keys at a time: use ContextParallelConfig(ulysses_degree=...)"
OWN_PLAN = "the model was split over devices by a cp_plan of your own, which may order its tokens in any way"


@dataclass(frozen=True)
class Exchange:
    """One attention call of a Ulysses group.

    Args:
        group: its processes.
        rank: of this one in it.
        streams: what is split by itself, in the sequence's order: how many of its tokens each device holds.
        heads: how many query heads each device gets.
        kv_heads: how many heads of keys and values.
    """

    group: Any
    rank: int
    streams: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @property
    def held(self) -> list[int]:
        """Tokens on each device, of all streams together."""
        return [sum(stream[device] for stream in self.streams) for device in range(len(self.heads))]

    @property
    def first_head(self) -> int:
        """The first query head that this device gets."""
        return sum(self.heads[: self.rank])

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, tokens held here, all heads, D) -> (B, heads of this device, N, D), in the sequence's order."""
        batch, mine, heads, size = x.shape
        shares = self.heads if heads == sum(self.heads) else self.kv_heads
        own, held = shares[self.rank], self.held
        sent = x.permute(2, 1, 0, 3).reshape(-1, batch, size)
        sizes = [own * tokens for tokens in held]
        got = _all_to_all(sent, sizes, [share * mine for share in shares], self.group).split(sizes)
        parts = [part.reshape(own, tokens, batch, size) for part, tokens in zip(got, held, strict=True)]
        pieces = [part.split([stream[d] for stream in self.streams], dim=1) for d, part in enumerate(parts)]
        whole = torch.cat([piece[index] for index in range(len(self.streams)) for piece in pieces], dim=1)
        return whole.permute(2, 0, 1, 3)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads of this device, N, D) -> (B, tokens held here, all heads, D): the way back."""
        batch, own, _, size = x.shape
        held, devices = self.held, len(self.heads)
        pieces = x.permute(1, 2, 0, 3).split([tokens for stream in self.streams for tokens in stream], dim=1)
        parts = [torch.cat(pieces[device::devices], dim=1).reshape(-1, batch, size) for device in range(devices)]
        mine = held[self.rank]
        sizes = [share * mine for share in self.heads]
        got = _all_to_all(torch.cat(parts), sizes, [own * tokens for tokens in held], self.group)
        return got.reshape(sum(self.heads), mine, batch, size).permute(2, 1, 0, 3)


def _all_to_all(x: torch.Tensor, output: list[int], given: list[int], group: Any) -> torch.Tensor:
    """Rows to and from each process; what autograd and the compiler know of `torch.distributed`."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_to_all_single_autograd(x.contiguous(), output, given, group))


def exchange(
    parallel: Any, query: torch.Tensor, key: torch.Tensor, sequence: Sequence | None, text_apart: bool
) -> Exchange | str:
    """How one attention call, query and key (B, tokens held here, H, D), is exchanged, or why it cannot be.

    `parallel`: what diffusers gave the processor (a ParallelConfig). The answer is the same on all devices.
    """
    config = parallel.context_parallel_config
    devices, rank = config.ulysses_degree, config._ulysses_local_rank
    if config.ring_degree > 1:
        return RING
    if sequence is None or query.shape[1] != key.shape[1]:
        return "context parallelism: this call is no self-attention over a sequence that is known"
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads < devices or (heads != kv_heads and (heads % devices or kv_heads % devices)):
        return f"context parallelism: {heads} heads, {kv_heads} of keys, cannot be shared by {devices} devices"
    if query.shape[1] == split(sequence.tokens, devices)[rank]:  # attention of the grid alone
        lengths = [sequence.tokens]
    elif text_apart:
        before = sequence.text_before
        lengths = [before, sequence.length - before] if before else [sequence.tokens, sequence.text_after]
    else:
        lengths = [sequence.length]
    streams = tuple(split(length, devices) for length in lengths)
    if sum(stream[rank] for stream in streams) != query.shape[1]:
        return (
            f"context parallelism: {query.shape[1]} tokens on device {rank} of {devices} are no share of the "
            f"{sequence.length} of the sequence"
        )
    return Exchange(config._ulysses_mesh.get_group(), rank, streams, split(heads, devices), split(kv_heads, devices))


def split(length: int, devices: int) -> tuple[int, ...]:
    """How diffusers cuts tokens (as `torch.tensor_split`): where it does not come out, the first get one more."""
    share, rest = divmod(length, devices)
    return tuple(share + (device < rest) for device in range(devices))


def text_is_apart(root: nn.Module) -> bool | str:
    """Whether a model that runs under context parallelism splits its text by itself, or why that cannot be told.

    Asked of the hooks by which diffusers splits; their plans are compared with the one that the model's class has.
    """
    plan = getattr(root, "_cp_plan", None) or {}
    known = list(plan.values())
    apart = False
    for module in root.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, hook in registry.hooks.items() if registry is not None else ():
            if not name.startswith("cp_input---"):
                continue
            if hook.metadata not in known:
                return OWN_PLAN
            apart = apart or "encoder_hidden_states" in hook.metadata
    return apart
