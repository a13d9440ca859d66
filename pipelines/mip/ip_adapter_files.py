"""Files of IP-Adapters, here or on the Hub, and the image encoders that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.methods.mip import has_text_weights
from attn_plugins.pipelines.mip.kinds import kind_of

ENCODER = "image_encoder"


@dataclass(frozen=True)
class AdapterFile:
    """A checkpoint on disk; `hub` is its owner/name and path there, if it came from the Hub."""

    path: Path
    hub: tuple[str, str] | None = None

    @classmethod
    def find(cls, adapter: str | Path) -> AdapterFile:
        """A file, or owner/name/path of one on the Hub, which is downloaded once.

        Raises:
            FileNotFoundError: neither.
            ValueError: a file that cannot be read (truncated?).
        """
        found = cls(Path(adapter))
        if not found.path.is_file():
            parts = str(adapter).split("/")
            if len(parts) < 3 or Path(adapter).is_absolute() or parts[0] in (".", "..", "~"):
                raise FileNotFoundError(
                    f"no IP-Adapter at {adapter}: give a file, or owner/name/path of one on the Hub"
                )
            from huggingface_hub import hf_hub_download

            hub = "/".join(parts[:2]), "/".join(parts[2:])
            found = cls(Path(hf_hub_download(*hub)), hub)
        has_text_weights(found.path)  # reads it: a truncated file is told here, by its name
        return found

    def load_into(self, pipe: Any, image_encoder: str | Path | None) -> None:
        """By the pipeline's own `load_ip_adapter`, with its image encoder.

        Raises:
            ValueError: no image encoder, or an adapter for a model of another width.
        """
        kind = kind_of(pipe)
        beside = self.hub is None or kind.encoder is not None  # else `load_ip_adapter` finds it beside the adapter
        if image_encoder is not None or (beside and getattr(pipe, "image_encoder", None) is None):
            pipe.register_modules(image_encoder=self._encoder(pipe, image_encoder, kind.encoder))
        try:
            if beside or self.hub is None:
                where = {"subfolder": "", "weight_name": self.path.name, kind.no_encoder: None}
                pipe.load_ip_adapter(str(self.path.parent), **where)
            else:
                folder, _, name = self.hub[1].rpartition("/")
                pipe.load_ip_adapter(self.hub[0], subfolder=folder, weight_name=name)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path.name} does not fit {type(pipe).__name__}: an adapter for a model of another width or with "
                f"other layers? ({str(error).splitlines()[0]})"
            ) from error

    def _encoder(self, pipe: Any, given: str | Path | None, published: str | None) -> Any:
        from transformers import CLIPVisionModelWithProjection

        folder = Path(given) if given is not None else self.path.parent / ENCODER
        if folder.is_dir():
            return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=pipe.dtype)
        given = published if given is None else given
        parts = str(given).split("/")
        if given is None or len(parts) < 2:
            raise ValueError(
                f"no image encoder at {folder}: give the folder of the CLIP vision model that {self.path.name} reads, "
                "or owner/name/path of it on the Hub"
            )
        name, inside = "/".join(parts[:2]), "/".join(parts[2:])
        return CLIPVisionModelWithProjection.from_pretrained(name, subfolder=inside, dtype=pipe.dtype)
