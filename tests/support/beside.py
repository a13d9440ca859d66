"""What must hold when something else is done to a patched model, before the patch or after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import attn_plugins

SMALL: dict[str, Any] = {"window": 2, "stride": 1, "min_tokens": 0, "dense_steps": 0}
FULL = {**SMALL, "window": -1}


def check_beside(
    build: Callable[[], Any],
    run: Callable[[Any], torch.Tensor],
    act: Callable[[Any], object],
    leave: Callable[[Any], object],
    *,
    full: dict[str, Any] = FULL,
    small: dict[str, Any] = SMALL,
    atol: float = 2e-5,
    exact: bool = True,
    changes: bool = False,
) -> None:
    """Do `act` and `leave` to what `build` makes, patched and not, in every order.

    A window that covers everything gives what the plain thing gives, with `act` and without it. A small one gives the
    same in whatever order. After `unpatch` it is the plain thing again, to the bit if `exact`, and without a trace.
    `changes`: `act` alone changes the output, or nothing was tested.
    """

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)

    plain = build()
    act(plain)
    acted = run(plain)
    leave(plain)
    left = run(plain)
    assert not changes or not torch.allclose(left, acted, atol=10 * atol), "what is done beside does nothing"
    sparse: list[torch.Tensor] = []
    orders = [(full, first, last) for first in (True, False) for last in (True, False)]
    for settings, patched_first, unpatched_first in [*orders, (small, True, True), (small, False, False)]:
        thing = build()
        if not patched_first:
            act(thing)
        handle = attn_plugins.patch(thing, "gna", **settings)
        if patched_first:
            act(thing)
        found = run(thing)
        if settings is full:
            close(found, acted)
        else:
            sparse.append(found)
            assert not torch.allclose(found, acted, atol=10 * atol), "the patch does nothing"
            close(found, sparse[0])
        if unpatched_first:
            handle.remove()
            _same(run(thing), acted, exact, atol)
        leave(thing)
        if not unpatched_first:
            if settings is full:
                close(run(thing), left)
            handle.remove()
        _same(run(thing), left, exact, atol)
        parts = getattr(thing, "components", {"": thing}).values()
        assert not [line for part in parts if isinstance(part, torch.nn.Module) for line in traces(part)]


def _same(found: torch.Tensor, expected: torch.Tensor, exact: bool, atol: float) -> None:
    if exact:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def traces(model: torch.nn.Module) -> list[str]:
    """Names under which something of ours hangs on a model."""
    found = []
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found += [repr(hook) for hook in hooks if "attn_plugins" in type(hook).__module__]
        owners = [module.__dict__, type(module).__dict__, type(getattr(module, "processor", None)).__dict__]
        found += [key for owner in owners for key in owner if "attn_plugins" in key]
    return found
