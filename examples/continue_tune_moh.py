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

from attn_plugins.pipelines.commands.values import options as read_options
from attn_plugins.pipelines.tuning.continue_tune_moh import MoHTuning
from attn_plugins.pipelines.tuning.loop_arguments import accelerator_of, add_loop_arguments, loop_options
from attn_plugins.pipelines.tuning.tasks import KINDS, task_of, trained_start
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
    defaults = LoopSettings(steps=150, batch=8, lr=3e-4, save_every=50, held_out=200)
    words = {"batch": "items a step and process", "seed": "of data and LoRA", "held_out": "items to judge models on"}
    add("--length", type=int, default=256, help="of a row of text, tokens")
    add_loop_arguments(
        parser, Path("out/moh"), defaults, words, lora="a LoRA, and learned routers", dense="the mixture"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    accelerator, settings = accelerator_of(args), LoopSettings(**loop_options(args))
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
