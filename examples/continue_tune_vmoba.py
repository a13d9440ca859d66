"""Fine-tune a video transformer with sparse attention in place, beside dense fine-tuning of the same length.

    python examples/continue_tune_vmoba.py                                          # the embedded model, on a CPU
    python examples/continue_tune_vmoba.py --steps 300 --lora 16 --resume
    accelerate launch --num_processes 8 examples/continue_tune_vmoba.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --data latents --lora 32 --mixed-precision bf16 --checkpointing --lr 1e-4

Into --out go `sparse/` and `dense/` (the tuned weights, with no trace of the patch, and a checkpoint each),
`tuned.json` and `tuned.png`. docs/continue_tuning.md says how to make a folder of latents, and what was measured.
"""

import argparse
import functools
from pathlib import Path

import torch

from attn_plugins.pipelines.commands.values import options as read_options
from attn_plugins.pipelines.demo_model import asset_folder
from attn_plugins.pipelines.tuning.continue_tune import ContinueTuning, preset_options
from attn_plugins.pipelines.tuning.loop_arguments import accelerator_of, add_loop_arguments, loop_options
from attn_plugins.pipelines.tuning.wan_checkpoint import load_wan, wan_shift
from attn_plugins.registry import method as known_method
from attn_plugins.training.tuning import TuneSettings
from attn_plugins.training.video_data import LatentFolder, MovingDigits

TRAINING_PRESETS = {"vmoba": ("wan_1_3b_train", "fast")}  # "balanced" chooses for every query, as published: slower
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(asset_folder()), help="folder (or hub name) of a WanPipeline; default: the embedded one")
    add(
        "--data", type=Path, help="folder of .safetensors files, a video each: latents (C, T, H, W), normalised as the "
        "transformer takes them, and prompt_embeds (L, D); default: moving digits, for the embedded model",
    )  # fmt: skip
    add("--frames", type=int, default=16, help="of the moving digits, 1 to 64; a frame is (size / 2) ** 2 tokens")
    add("--size", type=int, default=32, help="of the moving digits, px")
    add("--method", default="vmoba", help="any method that `attn-plugins list` shows")
    add("--preset", help="by name; default: the method's for training, if it has one. Scaled to the grid")
    add("--quality", help="of the preset: safe, balanced or fast")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="of the method: tau=0.35")
    add("--shift", type=float, help="of the noise levels; default: what the checkpoint's scheduler has")
    words = {
        "batch": "videos a step and process", "seed": "of the data, the noise and a LoRA",
        "lr": "peak rate of AdamW; 1e-5 is usual for all weights of a large model",
        "held_out": "videos of the held-out loss",
    }  # fmt: skip
    add_loop_arguments(
        parser, Path("out/continue_tune"), TuneSettings(), words, lora="a LoRA of the attention", dense="the sparse one"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    known_method(args.method)  # an unknown name should fail before a model is loaded
    preset, quality = TRAINING_PRESETS.get(args.method, (None, "balanced"))
    preset, quality = args.preset or preset, args.quality or quality
    options = preset_options(args.method, preset, quality) if preset else {"quality": quality}
    options |= read_options(args.option)
    data = LatentFolder(args.data, args.seed) if args.data else MovingDigits(args.frames, args.size, args.seed)
    accelerator = accelerator_of(args)
    # what a LoRA leaves alone may be in half precision, what is trained may not
    dtype = HALF.get(accelerator.mixed_precision, torch.float32) if args.lora else torch.float32
    settings = TuneSettings(**loop_options(args), shift=args.shift or wan_shift(args.model))
    load = functools.partial(load_wan, args.model, dtype)
    job = ContinueTuning(accelerator, load, data, settings, args.out, args.method, options)
    tuned = job.run(dense=not args.no_dense, resume=args.resume)
    if accelerator.is_main_process:
        print(tuned.table(), *tuned.sentences(), *(f"wrote {file}" for file in tuned.save(args.out)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
