"""Configs of mixtures: an architecture's own, with what BAM adds; one class and one `model_type` per architecture."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, is_dataclass
from typing import Any

from attn_plugins.models.bam.architectures import ARCHITECTURES, Architecture, of

# The classes of mixtures say that they live here: transformers copies the file of a class beside what it saves, and
# that file is the one that loads them again where attn_plugins is installed but not imported.
HOME = "attn_plugins.models.bam.modeling_attn_plugins_bam"
ATTENTION = ("all_params", "shared_kv", "mean")
GATES = ("unit", "paper")
OVER = ("batch", "item")


@dataclass(kw_only=True)
class BamFields:
    """What BAM (arXiv 2408.08274) adds to a dense config. Heads, widths, ... stay those of one expert.

    Attributes:
        num_experts: N.
        attention_experts: "all_params": each expert has its q, k, v and o (the paper's expert KV, N times the cache);
            "shared_kv": its q and o, with one k and v for all, and the dense model's cache; "mean": one attention, the
            experts' mean, without a router (BTX, sparse upcycling).
        num_experts_per_tok: feed-forwards that a token passes.
        expert_gate: of a feed-forward's output: "unit": p / p without its gradient, 1 at the start and always where one
            expert is taken, with a router that learns; "paper": p itself, which scales every output by about 1 / N.
        router_aux_loss_coef, router_z_loss_coef: alpha and beta of `NLL + alpha * N sum f_i P_i + beta * mean(lse^2)`,
            the mean over layers; only in training.
        router_loss_over: f and P of the tokens of a "batch", as in the paper, or of each "item" by itself, which makes
            accumulated micro-batches equal to one batch but wants every text spread over all experts.
        expert_names: for reports.
    """

    num_experts: int = 2
    attention_experts: str = "all_params"
    num_experts_per_tok: int = 1
    expert_gate: str = "unit"
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_loss_over: str = "batch"
    expert_names: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the dense config's
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts}: give 1 or more")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: legal are 1 to {self.num_experts}")
        choices = (("attention_experts", ATTENTION), ("expert_gate", GATES), ("router_loss_over", OVER))
        for name, legal in choices:
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: legal are {', '.join(map(repr, legal))}")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")
        _register_models(of(self.model_type))  # type: ignore[attr-defined]  # a class attribute of the dense config


_made: dict[str, Any] = {}
_registered: set[str] = set()


def config_class(row: Architecture) -> Any:
    """The config class of mixtures of this architecture.

    Raises:
        ImportError: a transformers whose configs are no dataclasses yet.
    """
    if row.name not in _made:
        if not is_dataclass(row.dense_class("Config")):
            raise ImportError("mixtures of BAM need transformers 5.12 or newer: pip install -U transformers")
        importlib.import_module(HOME)  # transformers looks there for the classes' file
        body = {
            "__module__": HOME,
            "__doc__": f"A mixture of {row.prefix} models. {BamFields.__doc__}",
            "model_type": row.model_type,
            "_auto_class": "AutoConfig",
            # The dense plan would cut heads and experts apart at places that do not exist here.
            "base_model_tp_plan": {},
        }
        _made[row.name] = type(row.class_name("Config"), (BamFields, row.dense_class("Config")), body)
    return _made[row.name]


def register() -> None:
    """All config classes into AutoConfig."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for row in ARCHITECTURES.values():
        AutoConfig.register(row.model_type, config_class(row), exist_ok=True)


def _register_models(row: Architecture) -> None:
    """The model classes, when a config is made: no model is loaded without one, and no modeling is imported before."""
    if row.name in _registered:
        return
    import transformers

    from attn_plugins.models.bam.model import part_class

    _registered.add(row.name)
    transformers.AutoModel.register(config_class(row), part_class(row, "Model"), exist_ok=True)
    getattr(transformers, row.auto).register(config_class(row), part_class(row, row.head), exist_ok=True)
