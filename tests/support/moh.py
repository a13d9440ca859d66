"""Routed heads by definition: an unpatched model whose heads are multiplied by gates before its output projection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

import attn_plugins
from attn_plugins import registry
from attn_plugins.method import SiteShape
from attn_plugins.patches.shapes import of_attention
from tests.support.tiny import randn

# (name of a layer, its input (B, N, C), the module) -> gates (B, N, H)
GatesOf = Callable[[str, torch.Tensor, Any], torch.Tensor]


def patch(model: Any, **options: Any) -> attn_plugins.PatchHandle:
    """Patched by moh; what it says about routers that are not trained is not these tests'."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attn_plugins: moh:")
        return attn_plugins.patch(model, "moh", **options)


def sites(model: Any) -> dict[str, tuple[Any, SiteShape]]:
    """The sites of a model that moh takes, and their sizes."""
    family = registry.family_of(model)
    assert family is not None
    found = {}
    for site in family.find_sites(model):
        if site.kind in ("self", "causal"):
            shape = of_attention(model, site.module)
            assert isinstance(shape, SiteShape)
            found[site.name] = site.module, shape
    return found


@contextlib.contextmanager
def gated(model: Any, gates_of: GatesOf) -> Iterator[None]:
    """Inside, every head of the sites is times its gate."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = []

    def see(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            inputs[name] = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)

        return hook

    def multiply(name: str, attention: Any, shape: SiteShape) -> Any:
        def hook(module: Any, args: Any) -> Any:
            gates = gates_of(name, inputs[name], attention).repeat_interleave(shape.head_dim, dim=-1)
            return (args[0] * gates.to(args[0].dtype), *args[1:])

        return hook

    for name, (module, shape) in sites(model).items():
        assert shape.output is not None, f"{name}: no output projection is known"
        hooks.append(module.register_forward_pre_hook(see(name), with_kwargs=True))
        output = module.get_submodule(shape.output)
        hooks.append(output.register_forward_pre_hook(multiply(name, module, shape)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_routers(patched: Any) -> GatesOf:
    """The gates of a patched model's routers, of the same names."""
    routers = {name: module.moh for name, (module, _) in sites(patched).items()}
    return lambda name, x, module: routers[name](x).gates


def by_query_norms(active: int, shared: int, heads: int, group: int = 1) -> GatesOf:
    """The paper's rule for LLaMA, a token at a time; rotation keeps norms."""

    def gates(name: str, x: torch.Tensor, module: Any) -> torch.Tensor:
        project = getattr(module, "q_proj", None) or module.to_q
        units = project(x).unflatten(-1, (heads // group, -1)).norm(dim=-1)
        out = torch.zeros(*x.shape[:2], heads // group)
        for b in range(x.shape[0]):
            for n in range(x.shape[1]):
                best = sorted(range(shared, heads // group), key=lambda h, b=b, n=n: -units[b, n, h].item())
                for head in [*range(shared), *best[: active - shared]]:
                    out[b, n, head] = 1
        return out.repeat_interleave(group, dim=-1)

    return gates


def scrambled(handle: attn_plugins.PatchHandle, size: float = 0.3) -> attn_plugins.PatchHandle:
    """Every tensor of the routers other than it began: large logits, other shared heads."""
    for root in handle.roots:
        for number, (module, _) in enumerate(sites(root).values()):
            router = getattr(module, "moh", None)
            if router is None:
                continue
            order = torch.randperm(router.budget.units, generator=torch.Generator().manual_seed(number))
            router.units.copy_(order)
            for seed, tensor in enumerate(router.state_dict().values()):
                if tensor.is_floating_point():
                    tensor.copy_(size * randn(*tensor.shape, seed=10 * number + seed))
    return handle
