"""A plan as tensors that GPU kernels walk over: made once per plan, device and tile size, and kept with the plan.

Plans that are made on the host are prepared there and uploaded. Plans whose lists already live on a device (dynamic
methods make them in each call) are prepared on the device, by sorts and sums of fixed size: nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attn_plugins.plan.bits import pack
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.intervals import Intervals, window_intervals
from attn_plugins.plan.pieces import Pieces, cut, upload
from attn_plugins.plan.rules import BitRule, WindowRule

LONG = 4  # a row of so many times the median work is taken first, before the short rows of any head
Made = TypeVar("Made")
KINDS = 4  # of entries: even and whole, even and masked, ragged and whole, ragged and masked


@dataclass(frozen=True, eq=False)
class Walk:
    """For each program of a kernel, the rows it owns and the pieces it visits.

    Attributes:
        work: (B or 1, H or 1, R, 8) int32: place and number of the rows; where their list begins in `entries`; where
            its even whole entries end, then the even masked ones, the ragged whole ones, the ragged masked ones; 0.
            Longest lists first.
        entries: (B or 1, H or 1, E, 2) int32: (first token, first place) of even pieces, (number of tokens, first
            place) of ragged ones.
        pattern: (step,) int32, tokens of an even piece relative to its first; None: they follow each other.
        lead: so many of the first rows are much longer than the others.
    """

    work: torch.Tensor
    entries: torch.Tensor
    pattern: torch.Tensor | None
    lead: int

    @property
    def rows(self) -> int:
        return self.work.shape[2]


@dataclass(frozen=True, eq=False)
class PlanTables:
    """What a kernel needs of a plan, on one device.

    Attributes:
        plan: on the host or not.
        device: where everything is.
        q_order, kv_order: (tokens,) int32, or None.
        intervals: of a rule that is row intervals.
        mask: (B or 1, H or 1, N, N_kv) bool where the plan has it, of a rule that is a bit mask.
        covers_q, covers_kv: whether the blocks are known to hold every token.
    """

    plan: BlockPlan
    device: torch.device
    q_order: torch.Tensor | None
    kv_order: torch.Tensor | None
    intervals: Intervals | None
    mask: torch.Tensor | None
    covers_q: bool
    covers_kv: bool

    def over_queries(self, q_step: int, kv_step: int) -> Walk:
        """Programs own queries and visit keys: for the forward and the gradient of q."""
        return self._kept(("over_queries", q_step, kv_step), lambda: _over_queries(self, q_step, kv_step))

    def over_keys(self, q_step: int, kv_step: int) -> Walk:
        """Programs own keys and visit queries: for the gradients of k and v."""
        return self._kept(("over_keys", q_step, kv_step), lambda: _over_keys(self, q_step, kv_step))

    def bits(self, *, own_keys: bool) -> torch.Tensor | None:
        """(B or 1, H or 1, own, words) int32: which tokens of the other side each one sees, or is seen by; by place."""
        if self.mask is None:
            return None
        mask, orders = self.mask, (self.plan.q_order, self.plan.kv_order)
        if own_keys:
            mask, orders = mask.mT, orders[::-1]
        return self._kept(("bits", own_keys), lambda: upload(pack(mask, *orders), self.device))

    def _kept(self, key: tuple[str | int, ...], make: Callable[[], Made]) -> Made:
        kept, whole = self.plan.prepared, (self.device, *key)
        if whole not in kept:
            kept[whole] = make()
        return kept[whole]

    def q_pieces(self, step: int) -> Pieces:
        plan = self.plan
        return cut(plan.q_start, plan.q_size, plan.q_order, plan.q_length, step, self._where)

    def kv_pieces(self, step: int) -> Pieces:
        plan = self.plan
        return cut(plan.kv_start, plan.kv_size, plan.kv_order, plan.kv_length, step, self._where)

    @property
    def known(self) -> bool:
        """Whether the host knows the lists."""
        return self.plan.lists.device.type == "cpu"

    @property
    def _where(self) -> torch.device:
        """Where tables are made: beside the lists."""
        return self.plan.lists.device


def rule_refusal(plan: BlockPlan) -> str:
    """Why GPU kernels cannot take the plan's mask rule; "" if they can."""
    if plan.rule is None or isinstance(plan.rule, (WindowRule, BitRule)) or hasattr(plan.rule, "intervals"):
        return ""
    return f"kernels take row intervals and bit masks, not a plan with a {type(plan.rule).__name__}"


def device_tables(plan: BlockPlan, device: torch.device) -> PlanTables:
    """The plan's tables on a device, made once.

    A rule other than `BitRule` and `WindowRule` is understood if it has `intervals(plan) -> Intervals`.

    Raises:
        ValueError: a mask rule that is neither row intervals nor a bit mask.
    """
    key = ("tables", device)
    if key not in plan.prepared:
        if refusal := rule_refusal(plan):
            raise ValueError(refusal)
        intervals = mask = None
        if isinstance(plan.rule, BitRule):
            mask = plan.rule.bits
        elif plan.rule is not None:
            rule: Any = plan.rule
            made = window_intervals(rule, plan) if isinstance(rule, WindowRule) else rule.intervals(plan)
            intervals = Intervals(upload(made.q, device), upload(made.k, device), made.guards)
        q_order, kv_order = (None if t is None else upload(t.int(), device) for t in (plan.q_order, plan.kv_order))
        covers_q = _covers(plan.q_start, plan.q_size, plan.q_length)
        covers_kv = _covers(plan.kv_start, plan.kv_size, plan.kv_length)
        plan.prepared[key] = PlanTables(plan, device, q_order, kv_order, intervals, mask, covers_q, covers_kv)
    return plan.prepared[key]


def _covers(start: torch.Tensor, size: torch.Tensor, length: int) -> bool:
    if start.device.type != "cpu" or size.device.type != "cpu":
        return False  # perhaps, but asking would wait for the device
    seen = torch.zeros(length + 1, dtype=torch.int64)
    seen.index_add_(0, start.long(), torch.ones_like(start, dtype=torch.int64))
    seen.index_add_(0, (start + size).long(), -torch.ones_like(start, dtype=torch.int64))
    return bool((seen.cumsum(0)[:-1] > 0).all())


def _over_queries(tables: PlanTables, q_step: int, kv_step: int) -> Walk:
    rows, columns = tables.q_pieces(q_step), tables.kv_pieces(kv_step)
    pieces, kinds = _listed(tables.plan, columns, tables.known)
    if not columns.alike:
        kinds, order = torch.sort(kinds, dim=-1, stable=True)
        pieces = pieces.gather(-1, order)
    ends = torch.stack([(kinds <= kind).sum(-1) for kind in range(KINDS)], dim=-1)  # (b, h, Q, 4)
    entries = _entries(columns, pieces).flatten(2, 3)
    begins = (torch.arange(kinds.shape[2], device=kinds.device) * kinds.shape[3]).expand(kinds.shape[:3])
    if tables.known:
        entries, begins = _packed(entries, (kinds < KINDS).flatten(2), ends[..., -1])
    begins, ends = begins[:, :, rows.block], torch.where((rows.size > 0)[:, None], ends[:, :, rows.block], 0)
    work = _work(rows, begins, ends + begins[..., None])
    by_length = torch.sort(ends[..., -1], dim=-1, descending=True, stable=True).indices
    work = work.gather(2, by_length[..., None].expand_as(work))
    return _walk(tables, work, entries, columns.pattern)


def _over_keys(tables: PlanTables, q_step: int, kv_step: int) -> Walk:
    rows, columns = tables.kv_pieces(kv_step), tables.q_pieces(q_step)
    keys, kinds = _listed(tables.plan, rows, tables.known)
    # One line per piece of queries and visit, sorted by piece of keys: what each of them is visited by, in order.
    keys, kinds = keys[:, :, columns.block], kinds[:, :, columns.block]  # (b, h, P, W)
    absent = (kinds == KINDS) | (columns.size == 0)[:, None]
    visit = kinds % 2 + 2 * (~columns.even[:, None])
    lines = torch.where(absent, KINDS * len(rows.start), KINDS * keys + visit).flatten(2)
    lines, order = torch.sort(lines, dim=-1, stable=True)
    marks = torch.arange(KINDS * len(rows.start) + 1, device=lines.device).expand(*lines.shape[:2], -1).contiguous()
    bounds = torch.searchsorted(lines, marks)
    if tables.known:
        order = order[..., : max(int(bounds[..., -1].max()), 1)]
    entries = _entries(columns, torch.div(order, kinds.shape[-1], rounding_mode="floor"))
    begins, ends = bounds[..., :-1:KINDS], bounds[..., 1:].unflatten(-1, (-1, KINDS))
    # One order for all heads and items: a program visits the queries of every head that shares its keys.
    length = (ends[..., -1] - begins).sum((0, 1))
    work = _work(rows, begins, ends)[:, :, torch.sort(length, descending=True, stable=True).indices]
    return _walk(tables, work, entries, columns.pattern)


def _listed(plan: BlockPlan, columns: Pieces, known: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, h, Q, W) int64: the pieces of each query block's list, and the kind of each; KINDS where there is none."""
    lists = plan.lists.clamp(min=0).long()
    full, count = (t.long()[..., None] for t in (plan.full, plan.count))
    slot = torch.arange(lists.shape[-1], device=lists.device)
    if columns.single:
        pieces, place = columns.base[lists], slot
    else:
        number = torch.where(slot < count, columns.number[lists], 0)
        ends = number.cumsum(-1)
        full = torch.where(slot < full, number, 0).sum(-1, keepdim=True)
        count = ends[..., -1:]
        width = int(count.max()) if known else min(lists.shape[-1] * columns.most, len(columns.start))
        place = torch.arange(max(width, 1), device=lists.device)
        listed = torch.searchsorted(ends, place.expand(*ends.shape[:-1], -1).contiguous(), right=True)
        listed = listed.clamp(max=lists.shape[-1] - 1)
        within = place - (ends - number).gather(-1, listed)
        pieces = (columns.base[lists.gather(-1, listed)] + within).clamp(0, len(columns.start) - 1)
    kinds = torch.where(columns.even[pieces], 0, 2) + (place >= full)
    return pieces, torch.where(place < count, kinds, KINDS)


def _entries(columns: Pieces, pieces: torch.Tensor) -> torch.Tensor:
    """(..., 2) int32: an even piece needs no number of tokens, and has its first token there."""
    return torch.stack([torch.where(columns.even, columns.first, columns.size), columns.start], dim=-1).int()[pieces]


def _packed(entries: torch.Tensor, there: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries without the gaps behind short lists, and where each list then begins."""
    ends = count.cumsum(-1)
    packed = entries.new_zeros(*entries.shape[:2], max(int(ends[..., -1].max()), 1), 2)
    for item in range(entries.shape[0]):
        for head in range(entries.shape[1]):
            mine = entries[item, head][there[item, head]]
            packed[item, head, : len(mine)] = mine
    return packed, ends - count


def _work(rows: Pieces, begins: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    own = torch.stack([rows.start, rows.size], dim=-1).expand(*begins.shape, 2)
    return torch.cat([own, begins[..., None], ends, torch.zeros_like(begins)[..., None]], dim=-1).int()


def _walk(tables: PlanTables, work: torch.Tensor, entries: torch.Tensor, pattern: torch.Tensor | None) -> Walk:
    lead = 0
    if tables.known:
        count = (work[..., 6] - work[..., 2]).float()
        usual = count.median(-1, keepdim=True).values.clamp(min=1)
        lead = int((count > LONG * usual).sum(-1).max())
    work, entries = upload(work.contiguous(), tables.device), upload(entries.contiguous(), tables.device)
    return Walk(work, entries, None if pattern is None else upload(pattern, tables.device), lead)
