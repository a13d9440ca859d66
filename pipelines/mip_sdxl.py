"""A picture of several named things, each after photos of it: MIP on Stable Diffusion XL or 1.5 or FLUX.1, with maps.

pipe = load("stabilityai/stable-diffusion-xl-base-1.0", "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.bin")
drawing = draw(pipe, {"cat": "cat.png", "dog": ["dog1.png", "dog2.png"]}, "a cat and a dog on a sofa", maps=True)
drawing.save("out", "sofa")
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attn_plugins import patched
from attn_plugins.methods.mip import ReferenceMaps, has_text_weights
from attn_plugins.pipelines.mip import heat_maps
from attn_plugins.pipelines.mip.ip_adapter_files import AdapterFile
from attn_plugins.pipelines.mip.kinds import kind_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Drawing:
    """What `draw` made.

    pictures: one a prompt and image asked for. maps: by name, (pictures, height, width) in 0..1: the share that each
    position took from that reference, as a mean over layers and steps; empty where none were asked for.
    """

    pictures: list[Image]
    maps: dict[str, torch.Tensor]

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write `<name>.png` (with a number, if they are several), and beside it, if there are maps, `<name>_maps.png`:
        the picture and a heat map of each reference. Returns what was written; the folder is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for index, picture in enumerate(self.pictures):
            stem = name if len(self.pictures) == 1 else f"{name}_{index}"
            written.append(folder / f"{stem}.png")
            picture.save(written[-1])
            if self.maps:
                written.append(folder / f"{stem}_maps.png")
                rows = {phrase: shares[index] for phrase, shares in self.maps.items()}
                heat_maps.sheet(picture, rows).save(written[-1])
        return written


def load(
    model: str | Path,
    adapter: str | Path,
    *,
    image_encoder: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    offload: bool = False,
) -> Any:
    """A pipeline with an IP-Adapter.

    Args:
        model: a pipeline of Stable Diffusion XL or 1.5, or of FLUX.1: a folder, or a name on the Hub.
        adapter: a checkpoint of an IP-Adapter or of MIP, .bin or .safetensors: a file, or owner/name/path on the Hub.
        image_encoder: the CLIP vision model that the adapter reads: a folder, or owner/name/path on the Hub. None: the
            folder image_encoder beside the adapter, or the pipeline's own; of FLUX at last the one on the Hub that its
            adapters were made with.
        dtype: None: float32 on a CPU; on a GPU float16, of FLUX bfloat16.
        device: None: cuda where there is one, else cpu.
        offload: keep on the GPU only the model that runs.

    Raises:
        ValueError, OSError: an adapter that cannot be read, is of another width, or whose image encoder is not found.
    """
    from diffusers import DiffusionPipeline

    file = AdapterFile.find(adapter)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        named = DiffusionPipeline.load_config(str(model)).get("_class_name", "")
        dtype = torch.float32 if device == "cpu" else kind_of(named).half
    with warnings.catch_warnings():
        # the name of this argument became `dtype`, which older diffusers ignore
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(str(model), torch_dtype=dtype)
    file.load_into(pipe, image_encoder)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def draw(
    pipe: Any,
    references: Mapping[str, Any],
    prompt: str | list[str],
    *,
    scale: float | None = None,
    scales: Mapping[str, float] | None = None,
    masks: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    maps: bool = False,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    **call: Any,
) -> Drawing:
    """Draw; the pipeline is left as it was.

    Args:
        pipe: what `load` returns, or any pipeline of Stable Diffusion XL or 1.5 or FLUX.1 with one IP-Adapter loaded.
        references: by name, a picture or several of the same thing: PIL images or files. The names stand in the prompt.
        prompt: one, or several.
        scale: of the adapter. None: 0.75, or 0.65 of adapters with more than four tokens, as published; of FLUX 1.
        scales: of single references, by name, times that.
        masks: by name, white where that reference may be: PIL images or files. Names without one may be anywhere.
        checkpoint: the adapter's file, as for `load`: of one of MIP `text_to_weight` is used, of a plain one nothing.
            None: training-free.
        maps: collect who was put where.
        seed: of the noise.
        options: more of the method: temperature, null_bias.
        **call: of the pipeline: num_inference_steps, guidance_scale, height, width, negative_prompt, ...

    Raises:
        ValueError: no references, names that cannot be phrases, scales or masks of other names; whatever `patch` says.
    """
    names = list(references)
    if not names:
        raise ValueError("references={}: give a picture for each name, as in {'cat': 'cat.png'}")
    for given, what in ((scales or {}, "scales"), (masks or {}, "masks")):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"{what} of {', '.join(unknown)}: the references are {', '.join(names)}")
    _mind_the_prompt(names, [prompt] if isinstance(prompt, str) else prompt)
    photos = {name: _photos(name, given) for name, given in references.items()}
    file = None if checkpoint is None else AdapterFile.find(checkpoint).path
    settings = {
        "phrases": names, "photos": [len(some) for some in photos.values()],
        "scales": [float((scales or {}).get(name, 1.0)) for name in names],
        "checkpoint": file if file is not None and has_text_weights(file) else None, **(options or {}),
    }  # fmt: skip
    call = {"generator": torch.Generator().manual_seed(seed), **call}
    if masks:
        options_of = kind_of(pipe).options
        call[options_of] = {**(call.get(options_of) or {}), "ip_adapter_masks": [_masks(names, masks, pipe, call)]}
    images = [[photo for some in photos.values() for photo in some]]
    with patched(pipe, "mip", **settings) as handle, _scaled(pipe, scale):
        if not maps:
            return Drawing(pipe(prompt=prompt, ip_adapter_image=images, **call).images, {})
        with ReferenceMaps(handle) as collected:
            pictures = pipe(prompt=prompt, ip_adapter_image=images, **call).images
    width, height = pictures[0].size
    shares = collected.mean((height, width))[-len(pictures) :].clamp(0, 1).cpu()  # under guidance the last are prompts'
    return Drawing(pictures, {name: shares[:, index] for index, name in enumerate(names)})


def _mind_the_prompt(names: Sequence[str], prompts: Sequence[str]) -> None:
    for name in names:
        if not any(name.lower() in prompt.lower() for prompt in prompts):
            warnings.warn(
                f"attn_plugins: no prompt says {name!r}: its reference has no words in the picture to go to",
                stacklevel=3,
            )


def _photos(name: str, given: Any) -> list[Image]:
    """One or several pictures, in RGB.

    Raises:
        ValueError: an empty list.
    """
    some = list(given) if isinstance(given, (list, tuple)) else [given]
    if not some:
        raise ValueError(f"no picture of {name!r}: give one or more")
    return [_opened(one).convert("RGB") for one in some]


def _opened(image: Any) -> Image:
    if not isinstance(image, (str, Path)):
        return image
    from PIL import Image as pil

    return pil.open(image)


@contextlib.contextmanager
def _scaled(pipe: Any, scale: float | None) -> Iterator[None]:
    """The adapter at a scale, in the block; None is as published for its number of tokens."""
    kind = kind_of(pipe)
    adapted = kind.adapted(pipe)
    before = [list(one.scale) for one in adapted]
    pipe.set_ip_adapter_scale(kind.published(pipe) if scale is None else scale)
    try:
        yield
    finally:
        for one, scales in zip(adapted, before, strict=True):
            one.scale[:] = scales


def _masks(names: Sequence[str], masks: Mapping[str, Any], pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """(1, references, height, width), as diffusers takes them."""
    from diffusers.image_processor import IPAdapterMaskProcessor
    from PIL import Image as pil

    side = kind_of(pipe).size(pipe)
    height, width = call.get("height") or side, call.get("width") or side
    white = pil.new("L", (width, height), 255)
    images = [_opened(masks[name]) if name in masks else white for name in names]
    made = [IPAdapterMaskProcessor().preprocess(image, height=height, width=width) for image in images]
    return torch.cat(made).reshape(1, len(names), height, width)
