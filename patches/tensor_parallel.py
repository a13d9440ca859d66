"""Which heads of a layer a device has under tensor parallelism; methods that have settings per head count by it."""

from __future__ import annotations

from typing import Any

from torch import nn


def share_of_heads(attention: nn.Module) -> tuple[int, int] | None:
    """(which share, of how many) of an attention's heads is here, or None: all of them.

    diffusers and transformers both shard weights as DTensors on a mesh that has a dimension called "tp", and each
    device then runs plain attention on consecutive heads. FSDP's meshes have none: it gathers before it computes.
    """
    for parameter in attention.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        names = getattr(mesh, "mesh_dim_names", None) or ()
        if "tp" in names:
            at = names.index("tp")
            return mesh.get_local_rank(at), mesh.size(at)
    return None
