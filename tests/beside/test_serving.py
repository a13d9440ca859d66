"""vLLM-Omni's sparse attention contract, against a stand-in for its dispatcher.

The stand-in does what its `SPARSE_ATTN` backend does with a plugin: finds it by name in an entry point group, merges
three tiers of params, refuses inputs whose capability is not announced, and calls it with (B, N, H, D).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_plugins import serving
from attn_plugins.method import AttentionCall
from attn_plugins.runtime import Refused
from tests.support.tiny import randn
from tests.support.windowed import brute_force

GRID = (3, 4, 4)
SMALL = {"window": 2, "stride": 1}


def announced() -> Callable[..., torch.Tensor]:
    """The function, by what pyproject announces: an installed package's metadata says the same."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    group = project["project"]["entry-points"][serving.ENTRY_POINTS]
    return EntryPoint("attn_plugins", group["attn_plugins"], serving.ENTRY_POINTS).load()


class Server:
    """One attention layer of the server."""

    def __init__(self, params: dict[str, Any], causal: bool = False, scale: float = 8**-0.5) -> None:
        self.function = announced()
        self.params, self.causal, self.scale = params, causal, scale
        self.capabilities = getattr(self.function, "capabilities", {})

    def forward(
        self,
        tokens: list[torch.Tensor],
        step: dict[str, Any] | None = None,
        mask: torch.Tensor | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        if mask is not None and not self.capabilities.get("supports_attention_mask"):
            raise ValueError("the plugin does not advertise 'supports_attention_mask'")
        merged = {**self.params, **(step or {}), **extra}
        params = {key: value for key, value in merged.items() if value is not None}
        return self.function(*tokens, params, is_causal=self.causal, softmax_scale=self.scale)


def tokens(count: int = 48, heads: int = 2) -> list[torch.Tensor]:
    return [randn(2, count, heads, 8, seed=seed) for seed in range(3)]


def dense(qkv: list[torch.Tensor], causal: bool = False) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def windows(qkv: list[torch.Tensor], text: int = 0) -> torch.Tensor:
    from attn_plugins.sequence import Sequence

    q, k, v = (t.transpose(1, 2) for t in qkv)
    call = AttentionCall(q, k, v, "joint", Sequence(GRID, text))
    return brute_force(call, (2, 2, 2), (1, 1, 1)).transpose(1, 2).float()


FRAMEWORK = {
    "latent_shape": torch.tensor([[3, 8, 8], [3, 8, 8]]), "patch_size": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    "denoise_step_idx": torch.tensor([4, 4]), "total_denoise_steps": torch.tensor([10, 10]),
    "total_latent_frames": 3, "kv_cache_dtype": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    "place", [{"grid": GRID}, {"grid": [-1, 4, 4]}, FRAMEWORK], ids=["grid", "one axis open", "the framework's"]
)
def test_a_window_is_what_brute_force_says(place: dict[str, Any]) -> None:
    qkv = tokens()
    out = Server({"method": "gna", "options": SMALL, "strict": True}).forward(qkv, place)
    assert out.shape == qkv[0].shape and out.dtype == qkv[0].dtype
    torch.testing.assert_close(out, windows(qkv), atol=2e-6, rtol=1e-5)


def test_text_around_the_grid() -> None:
    qkv = tokens(48 + 5)
    out = Server({"options": SMALL, "grid": GRID, "text_before": 5, "strict": True}).forward(qkv)
    torch.testing.assert_close(out, windows(qkv, text=5), atol=2e-6, rtol=1e-5)


def test_a_full_window_is_plain_attention() -> None:
    qkv = tokens()
    out = Server({"options": {"window": -1}, "grid": GRID, "strict": True}).forward(qkv)
    torch.testing.assert_close(out, dense(qkv), atol=2e-6, rtol=1e-5)


def test_dense_steps() -> None:
    qkv, server = tokens(), Server({"options": SMALL, "dense_steps": 0.3, "grid": GRID})
    for step, is_dense in ((2, True), (3, False)):
        now = {"denoise_step_idx": torch.tensor([step, step]), "total_denoise_steps": torch.tensor([10, 10])}
        assert torch.equal(server.forward(qkv, now), dense(qkv)) == is_dense
    mixed = {"denoise_step_idx": torch.tensor([5, 0]), "total_denoise_steps": 10}
    assert torch.equal(server.forward(qkv, mixed), dense(qkv))
    with pytest.raises(ValueError, match="the server tells no denoise_step_idx"):
        server.forward(qkv)


def test_a_value_changed_in_place_is_read_again() -> None:
    qkv, server = tokens(), Server({"options": SMALL, "dense_steps": 1, "grid": GRID})
    now = {"denoise_step_idx": torch.tensor([0, 0])}
    assert torch.equal(server.forward(qkv, now), dense(qkv))
    now["denoise_step_idx"].fill_(1)
    assert not torch.equal(server.forward(qkv, now), dense(qkv))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({}, "no token grid"),
        ({"grid": (3, 4, 5)}, "3x4x5 .* make 60, and there are 48"),
        ({"grid": (-1, -1, 4)}, "one of them may be -1"),
        ({**FRAMEWORK, "latent_shape": torch.tensor([[3, 8, 8], [3, 4, 16]])}, "different latent shapes"),
    ],
)
def test_what_cannot_be_told_is_dense_with_a_warning(place: dict[str, Any], reason: str) -> None:
    serving._layer.cache_clear()  # each reason is said once
    qkv = tokens()
    with pytest.warns(UserWarning, match=reason):
        assert torch.equal(Server({"options": SMALL}).forward(qkv, place), dense(qkv))
    with pytest.raises(Refused, match=reason):
        Server({"options": SMALL, "strict": True}).forward(qkv, place)


def test_what_a_method_refuses_is_dense_with_a_warning() -> None:
    serving._layer.cache_clear()
    qkv = tokens()
    with pytest.warns(UserWarning, match="masks the future"):
        out = Server({"options": SMALL, "grid": GRID}, causal=True).forward(qkv)
    assert torch.equal(out, dense(qkv, causal=True))


def test_masks_are_refused_by_the_server() -> None:
    with pytest.raises(ValueError, match="does not advertise"):
        Server({"options": SMALL, "grid": GRID}).forward(tokens(), mask=torch.ones(2, 48))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"method": "gnaa"}, ValueError, "unknown method 'gnaa'.*'gna'"),
        ({"options": {"windw": 3}}, TypeError, "unknown option 'windw'.*'window'"),
        ({"options": "window"}, ValueError, "as a dict"),
        ({"options": {"window": 2, "per_head": [{"heads": [0], "window": 3}]}}, ValueError, "per_head"),
        ({"options": {"window": 2, "per_layer": [{"layers": [0], "window": 3}]}}, ValueError, "layer to layer"),
        ({"options": SMALL, "layer": [3, 2]}, ValueError, r"layer=\[3, 2\]"),
        ({"options": SMALL, "dense_steps": 1.5}, ValueError, "dense_steps=1.5"),
    ],
)
def test_bad_settings_are_named(params: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Server({"grid": GRID, **params}).forward(tokens())


def test_a_layer_that_is_told_gets_its_own_setting() -> None:
    qkv, options = tokens(), {"window": -1, "per_layer": [{"layers": [1], "window": 2, "stride": 1}]}
    rows = [Server({"options": options, "grid": GRID, "layer": [i, 2]}).forward(qkv) for i in range(2)]
    torch.testing.assert_close(rows[0], dense(qkv), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(rows[1], windows(qkv), atol=2e-6, rtol=1e-5)
