"""Turn a dense model into a mixture of heads: untrained, calibrated, tuned, beside dense tuning of the same length.

    python examples/continue_tune_moh.py                                  # the embedded Llama on Python's own texts
    python examples/continue_tune_moh.py --kind vit                       # a small ViT on handwritten digits
    python examples/continue_tune_moh.py --lora 8 --resume                # routers and a LoRA
    accelerate launch examples/continue_tune_moh.py --model meta-llama/Llama-3.2-1B --data book.txt notes.txt \\
        --steps 2000 --batch 4 --length 2048 --mixed-precision bf16

--kind language (any causal language model), vit (any picture classifier) or dit (diffusers' DiT). Without --model a
small one is used, which is trained first where none is at hand. Into --out go `moh/` (attn_plugins.from_pretrained
loads it; of a LoRA, the LoRA and the routers), `dense/`, `tuned.json` and `tuned.png`. docs/continue_tuning.md says
what was measured.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator

from attn_plugins.pipelines.cli_values import options as read_options
from attn_plugins.pipelines.continue_tune_moh import MoHTuning
from attn_plugins.pipelines.tasks import KINDS, task_of, trained_start
from attn_plugins.training.loop import LoopSettings


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", choices=KINDS, default="language", help="of model")
    add("--model", help="folder or hub name; default: a small model of this kind")
    add("--data", type=Path, nargs="*", default=[], help="text files, or one folder of folders of pictures")
    add("--size", type=int, help="px, of pictures; default: what the model is made for")
    add("--start-steps", type=int, default=600, help="of a small model's own training")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="of moh: active=0.5, router=learned")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of routers and calibration")
    add("--calibration", type=int, default=16, help="batches")
    add("--balance", type=float, default=0.01, help="weight of the balance loss of router=learned")
    add("--out", type=Path, default=Path("out/moh"))
    add("--resume", action="store_true", help="take up what --out has; to the bit what it had been without a stop")
    add("--no-dense", action="store_true", help="skip the dense run, to which the mixture is compared")
    add("--lora", type=int, default=0, metavar="RANK", help="train a LoRA and the routers; default: everything")
    add("--checkpointing", action="store_true", help="recompute activations in the backward: slower, less memory")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate launch` says, else no")
    add("--threads", type=int, default=0, help="of the CPU; 0 leaves PyTorch's own choice")
    for name, default, text in (
        ("steps", 150, "of the optimizer"),
        ("batch", 8, "items a step and process"),
        ("length", 256, "of a row of text, tokens"),
        ("lr", 3e-4, "peak rate of AdamW"),
        ("seed", 0, "of the data and a LoRA"),
        ("save_every", 50, "steps between checkpoints"),
        ("held_out", 200, "items that models are judged on"),
    ):
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text}; default {default}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.accelerator.is_available())
    names = ("steps", "batch", "lr", "seed", "save_every", "held_out", "lora", "checkpointing")
    settings = LoopSettings(**{name: getattr(args, name) for name in names})
    start = trained_start(accelerator, args.out / "start", LoopSettings(steps=args.start_steps, batch=16, lr=2e-3))
    task = task_of(
        args.kind, args.model, args.data, length=args.length, held_out=args.held_out, size=args.size, start=start
    )
    job = MoHTuning(
        accelerator, task, settings, args.out, read_options(args.option), args.seeds, args.calibration, args.balance
    )
    tuned = job.run(dense=not args.no_dense, resume=args.resume)
    if accelerator.is_main_process:
        print(tuned.table(), *tuned.sentences(), *(f"wrote {file}" for file in tuned.save(args.out)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
