"""Turn a dense vision transformer into one with agent attention, and tune it, beside dense tuning of the same length.

    python examples/continue_tune_agent_vit.py                            # a small ViT on handwritten digits, on a CPU
    python examples/continue_tune_agent_vit.py --lora 8 --resume          # only biases, convolutions and a LoRA
    accelerate launch examples/continue_tune_agent_vit.py --model facebook/deit-base-patch16-224 --data pictures \\
        --steps 5000 --batch 64 --lr 1e-4 --mixed-precision bf16

Without --model a small dense ViT is trained first, in minutes, and kept in --out/start. --data is a folder of folders
of pictures, a class each. Into --out go `agents/` (attn_plugins.from_pretrained loads it; of a LoRA, the LoRA and the
agents' weights), `dense/`, `tuned.json` and `tuned.png`. docs/continue_tuning.md says what was measured.
"""

import argparse
import functools
from pathlib import Path

import torch
from accelerate import Accelerator

from attn_plugins.pipelines.cli_values import options as read_options
from attn_plugins.pipelines.continue_tune_vit import AgentTuning, small_dense_model
from attn_plugins.training.loop import LoopSettings
from attn_plugins.training.pictures import DigitPictures, PictureFolder


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub name of a dense classifier: ViT, DeiT, DINOv2, ...; default: a small ViT")
    add("--data", type=Path, help="folder of folders of pictures, a class each; default: digits of scikit-learn")
    add("--size", type=int, default=224, help="px, of the pictures")
    add("--speeds", type=int, nargs="+", default=[224, 448, 896], help="px, of the pictures whose forward is timed")
    add("--start-steps", type=int, default=2000, help="of the small ViT's own training")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="of trained_agent: agents=25")
    add("--out", type=Path, default=Path("out/agent_vit"))
    add("--resume", action="store_true", help="take up what --out has; to the bit what it had been without a stop")
    add("--no-dense", action="store_true", help="skip the dense run, to which the one with agents is compared")
    add("--lora", type=int, default=0, metavar="RANK", help="train a LoRA and the agents' weights; default: everything")
    add("--checkpointing", action="store_true", help="recompute activations in the backward: slower, less memory")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate launch` says, else no")
    add("--threads", type=int, default=0, help="of the CPU; 0 leaves PyTorch's own choice")
    for name, default, text in (
        ("steps", 500, "of the optimizer"),
        ("batch", 16, "pictures a step and process"),
        ("lr", 5e-4, "peak rate of AdamW"),
        ("seed", 0, "of the data and a LoRA"),
        ("save_every", 250, "steps between checkpoints"),
        ("held_out", 1000, "pictures that models are judged on"),
    ):
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text}; default {default}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = PictureFolder(args.data, args.size, args.seed) if args.data else DigitPictures(args.size, args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.accelerator.is_available())
    if args.model:
        from transformers import AutoModelForImageClassification

        load = functools.partial(AutoModelForImageClassification.from_pretrained, args.model)
    else:
        load = small_dense_model(accelerator, data, args.size, args.start_steps, args.out / "start", args.seed)
    names = ("steps", "batch", "lr", "seed", "save_every", "held_out", "lora", "checkpointing")
    settings = LoopSettings(**{name: getattr(args, name) for name in names})
    job = AgentTuning(accelerator, load, data, settings, args.out, read_options(args.option), args.speeds)
    tuned = job.run(dense=not args.no_dense, resume=args.resume)
    if accelerator.is_main_process:
        print(tuned.table(), *tuned.sentences(), *(f"wrote {file}" for file in tuned.save(args.out)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
