"""Train MIP on an IP-Adapter, so that each of two references goes to its name, beside the adapter as it is.

    python examples/train_mip.py                                       # a small pipeline and drawn pictures, on a CPU
    python examples/train_mip.py --steps 800 --dice 0.1 --resume
    accelerate launch examples/train_mip.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter h94/IP-Adapter/models/ip-adapter_sd15.safetensors --data cutouts \\
        --image-encoder h94/IP-Adapter/models/image_encoder --clip openai/clip-vit-base-patch32 --lr 1e-4

Only `to_k_ip`, `to_v_ip` and `text_to_weight` are trained. Into --out go `mip.safetensors`, for load_ip_adapter,
`tuned.json`, `tuned.png` and `tuned_sheet.png`. docs/continue_tuning.md says what was measured.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.tuning.loop_arguments import accelerator_of, add_loop_arguments, loop_options
from attn_plugins.pipelines.tuning.train_mip import MIPSettings, MIPTraining
from attn_plugins.pipelines.tuning.train_mip_models import load_adapted, small_folder
from attn_plugins.training.mip import Drops
from attn_plugins.training.two_objects import SIZE, DrawnObjects
from attn_plugins.training.two_objects_folder import FolderObjects, ObjectQuality
from attn_plugins.training.two_objects_model import ADAPTER

OWN = ("dice", "drawn", "sampler_steps", "guidance", "scale")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub name of a Stable Diffusion 1.5 or XL pipeline; default: the embedded small one")
    add("--adapter", help="file of its IP-Adapter, or owner/name/path of one on the Hub")
    add("--image-encoder", help="folder of the CLIP vision model that it reads, or owner/name/path")
    add("--data", type=Path, help="folder of cut-outs, <class>/<any>.png; default: drawn pictures")
    add("--size", type=int, help="px, of the pictures; default: 32, with --model 512")
    add("--clip", help="folder or hub name of a CLIP model: choose cut-outs and pairs of --data by their quality")
    add("--min-text", type=float, default=0.2, help="cosine of a cut-out and its name, at least")
    add("--max-alike", type=float, default=0.85, help="cosine of the two cut-outs of a pair, at most")
    add("--drops", type=float, nargs=3, default=(0.05, 0.05, 0.05), metavar=("IMAGE", "TEXT", "BOTH"))
    add("--dice", type=float, default=0.0, help="weight of the Dice loss on where references are put; 0 in the paper")
    add("--scale", type=float, default=1.0, help="of the adapter")
    add("--drawn", type=int, default=64, help="held-out pairs that are drawn")
    add("--sampler-steps", type=int, default=20)
    add("--guidance", type=float, default=3.0)
    defaults = MIPSettings(steps=1000, batch=16, lr=1e-3, save_every=100, held_out=64)
    words = {
        "batch": "pictures a step and process", "seed": "of data and noise", "held_out": "pairs to judge on",
        "lr": "peak rate of AdamW; 1e-4 in the paper",
    }  # fmt: skip
    add_loop_arguments(parser, Path("out/train_mip"), defaults, words)
    return parser.parse_args(arguments)


def data_of(args: argparse.Namespace, size: int) -> Any:
    if args.data is None:
        return DrawnObjects(args.seed, size)
    quality = None
    if args.clip:
        from transformers import CLIPModel, CLIPProcessor

        found = CLIPModel.from_pretrained(args.clip).eval(), CLIPProcessor.from_pretrained(args.clip)
        quality = ObjectQuality(*found, args.min_text, args.max_alike)
    return FolderObjects(args.data, size, args.seed, quality)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if (args.model is None) != (args.adapter is None):
        raise SystemExit("--model and --adapter go together: an adapter is for one kind of model")
    accelerator = accelerator_of(args)
    folder = small_folder()
    load = functools.partial(load_adapted, args.model or folder, image_encoder=args.image_encoder)
    size = args.size or (512 if args.model else SIZE)
    settings = MIPSettings(
        **loop_options(args), drops=Drops(*args.drops), **{name: getattr(args, name) for name in OWN}
    )
    job = MIPTraining(
        accelerator, load, Path(args.adapter or folder / ADAPTER), data_of(args, size), settings, args.out
    )
    tuned = job.run(resume=args.resume)
    if accelerator.is_main_process:
        print(tuned.table(), *tuned.sentences(), *(f"wrote {file}" for file in tuned.save(args.out)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
