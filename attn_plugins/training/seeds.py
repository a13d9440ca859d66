"""Numbers that depend on a key alone: what is drawn is the same in every process, in every run, whenever asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch

Thing = TypeVar("Thing")


def seeded(*key: object) -> torch.Generator:
    """A CPU generator for a key of numbers and words: equal keys give equal streams, in every process."""
    # torch reads 32 bits of a seed, so that the parts of a key have to be mixed
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


def in_epochs(things: Sequence[Thing], number: int, seed: int) -> Thing:
    """The thing at place `number` of an endless row: every one once, in an order of its own, before any comes again."""
    epoch, place = divmod(number, len(things))
    order = torch.randperm(len(things), generator=seeded(seed, "epoch", epoch))
    return things[int(order[place])]
