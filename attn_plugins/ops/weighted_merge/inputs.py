"""What `weighted_merge` asks of its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_plugins.ops.checks import DTYPES, INTEGERS


def check_inputs(
    q: torch.Tensor,
    text_out: torch.Tensor,
    phrase_k: torch.Tensor,
    phrase_lengths: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    image_lengths: torch.Tensor | Sequence[int] | None,
    phrase_q: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The image lengths as a tensor (1 or B, R), or None.

    Values of lengths are checked where reading them waits for no device.

    Raises:
        ValueError, TypeError: what does not go together.
    """
    _check_shapes(q, text_out, phrase_k, image_k, image_v)
    tensors = {"q": q, "text_out": text_out, "phrase_k": phrase_k, "image_k": image_k, "image_v": image_v}
    if phrase_q is not None:
        tensors["phrase_q"] = phrase_q
        if phrase_q.shape != q.shape:
            raise ValueError(f"phrase_q {tuple(phrase_q.shape)}: it is of the positions of q, {tuple(q.shape)}")
    if len({t.dtype for t in tensors.values()}) > 1 or q.dtype not in DTYPES:
        told = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        legal = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise TypeError(f"{told}: cast them to one floating dtype: {legal}")
    if len({t.device for t in (*tensors.values(), phrase_lengths)}) > 1:
        told = ", ".join(f"{name} on {t.device}" for name, t in {**tensors, "phrase_lengths": phrase_lengths}.items())
        raise ValueError(f"{told}: move them to one device")
    batch, references = image_k.shape[:2]
    _check_lengths("phrase_lengths", phrase_lengths, batch, references, phrase_k.shape[3], "phrase_k")
    if image_lengths is None:
        return None
    if not isinstance(image_lengths, torch.Tensor):
        image_lengths = torch.tensor(list(image_lengths), device=q.device)
    if image_lengths.ndim == 1:
        image_lengths = image_lengths[None]
    if image_lengths.device != q.device:
        raise ValueError(f"image_lengths is on {image_lengths.device}, q on {q.device}: move it there")
    _check_lengths("image_lengths", image_lengths, batch, references, image_k.shape[3], "image_k")
    return image_lengths


def _check_shapes(
    q: torch.Tensor, text_out: torch.Tensor, phrase_k: torch.Tensor, image_k: torch.Tensor, image_v: torch.Tensor
) -> None:
    if q.ndim != 4 or text_out.shape != q.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, text_out {tuple(text_out.shape)}: both are (batch, heads, positions, head_dim)"
        )
    batch, heads, _, dim = q.shape
    images = f"image_k {tuple(image_k.shape)}, image_v {tuple(image_v.shape)}"
    if image_k.ndim != 5 or image_v.shape != image_k.shape:
        raise ValueError(f"{images}: both are (batch, references, heads, tokens, head_dim)")
    if (image_k.shape[0], *image_k.shape[2::2]) != (batch, heads, dim):
        raise ValueError(f"{images}: with q {tuple(q.shape)} they are ({batch}, references, {heads}, tokens, {dim})")
    if not image_k.shape[1] or not image_k.shape[3]:
        raise ValueError(f"{images}: at least one reference of one token is needed")
    references = image_k.shape[1]
    if (
        phrase_k.ndim != 5
        or phrase_k.shape[0] not in (1, batch)
        or phrase_k.shape[1:3] != (references, heads)
        or phrase_k.shape[4] != dim
        or not phrase_k.shape[3]
    ):
        raise ValueError(
            f"phrase_k {tuple(phrase_k.shape)}: for {references} references and q {tuple(q.shape)} it is "
            f"(1 or {batch}, {references}, {heads}, rows, {dim}), with one phrase for each reference"
        )


def _check_lengths(name: str, lengths: torch.Tensor, batch: int, references: int, most: int, of: str) -> None:
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"{name} is {lengths.dtype}: give int32 or int64")
    if lengths.ndim != 2 or lengths.shape[0] not in (1, batch) or lengths.shape[1] != references:
        raise ValueError(f"{name} {tuple(lengths.shape)}: give (1 or {batch}, {references}), one number a reference")
    if torch.compiler.is_compiling() or type(lengths) is not torch.Tensor:
        return
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(value) for value in lengths.aminmax())
        if low < 0 or high > most:
            raise ValueError(f"{name} are {low}..{high}: legal are 0..{most}, the rows of {of}")
