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

from attn_plugins.pipelines.commands.values import options as read_options
from attn_plugins.pipelines.tuning.continue_tune_vit import AgentTuning, small_dense_model
from attn_plugins.pipelines.tuning.loop_arguments import accelerator_of, add_loop_arguments, loop_options
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
    defaults = LoopSettings(steps=500, batch=16, lr=5e-4, save_every=250, held_out=1000)
    words = {"batch": "pictures a step and process", "seed": "of data and LoRA", "held_out": "pictures to judge on"}
    add_loop_arguments(
        parser, Path("out/agent_vit"), defaults, words, lora="a LoRA and the agents", dense="the one with agents"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    data = PictureFolder(args.data, args.size, args.seed) if args.data else DigitPictures(args.size, args.seed)
    accelerator = accelerator_of(args)
    if args.model:
        from transformers import AutoModelForImageClassification

        load = functools.partial(AutoModelForImageClassification.from_pretrained, args.model)
    else:
        load = small_dense_model(accelerator, data, args.size, args.start_steps, args.out / "start", args.seed)
    settings = LoopSettings(**loop_options(args))
    job = AgentTuning(accelerator, load, data, settings, args.out, read_options(args.option), args.speeds)
    tuned = job.run(dense=not args.no_dense, resume=args.resume)
    if accelerator.is_main_process:
        print(tuned.table(), *tuned.sentences(), *(f"wrote {file}" for file in tuned.save(args.out)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
