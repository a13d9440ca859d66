"""BAM, branch-attend-mix: N dense models of one architecture as one mixture (arXiv 2408.08274).

After `import attn_plugins`, `AutoModelForCausalLM` (of pictures: `AutoModelForImageClassification`) loads what
`attn-plugins upcycle` wrote. The classes are named
AttnPluginsBam<Architecture><Part>: `AttnPluginsBamLlamaForCausalLM`, `AttnPluginsBamPhiConfig`, ...
"""

from __future__ import annotations

from typing import Any

from attn_plugins.models.bam.architectures import ARCHITECTURES, Architecture, of

__all__ = ["ARCHITECTURES", "Architecture", "named_class", "of"]


def named_class(name: str) -> Any:
    """A class of mixtures by its name; made when it is first asked for.

    Raises:
        AttributeError: there is none of that name.
    """
    from attn_plugins.models.bam import config

    for row in ARCHITECTURES.values():
        for part in ("Config", "Model", row.head, "Attention", row.layer):
            if name == row.class_name(part):
                if part == "Config":
                    return config.config_class(row)
                from attn_plugins.models.bam import model

                return model.part_class(row, part)
    raise AttributeError(f"no class {name!r} in attn_plugins.models.bam")


def __getattr__(name: str) -> Any:
    if name.startswith("AttnPluginsBam"):
        return named_class(name)
    raise AttributeError(f"module 'attn_plugins.models.bam' has no attribute {name!r}")
