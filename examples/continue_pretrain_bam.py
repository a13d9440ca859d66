"""Branch a model into specialists, mix them (BTX, BAM), and train the mixtures on, beside the dense model.

    python examples/continue_pretrain_bam.py                              # the embedded Llama: code and prose
    python examples/continue_pretrain_bam.py --resume
    python examples/continue_pretrain_bam.py --vision                     # a small ViT: handwriting and photographs
    accelerate launch examples/continue_pretrain_bam.py --model Qwen/Qwen2.5-0.5B --domain code code/*.py \\
        --domain law law/*.txt --steps 2000 --branch-steps 2000 --length 1024 --mixed-precision bf16

With --vision a domain is a folder of folders of pictures, a class each, and --model a ViT with a head for the classes
of all domains; without --model a small one is trained on all of them first, and kept in --out/start. Into --out go
`branches/` (seed and specialists), a folder for each mixture (`start/` as it was upcycled), the dense runs,
`pretrained.json` and `pretrained.png`. docs/continue_tuning.md says what was measured.
"""

import argparse
import dataclasses
from pathlib import Path

import attn_plugins  # noqa: F401  # the Auto classes know mixtures then
from attn_plugins.pipelines.tuning.continue_pretrain_bam import BamPretraining
from attn_plugins.pipelines.tuning.loop_arguments import accelerator_of, add_loop_arguments, loop_options
from attn_plugins.pipelines.tuning.picture_domains import picture_domains
from attn_plugins.pipelines.tuning.tasks import domains_of, trained_start
from attn_plugins.training.loop import LoopSettings

TEXT = LoopSettings(steps=100, batch=8, lr=3e-4, held_out=100)
VISION = {"steps": 150, "branch_steps": 150, "batch": 16, "lr": 3e-4, "held_out": 300, "out": Path("out/bam_vit")}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    told = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in VISION.items())
    add("--vision", action="store_true", help=f"experts of a vision transformer; defaults are then {told}")
    add("--model", help="folder or hub name of the seed; default: the embedded Llama, or a small ViT")
    add("--domain", nargs="+", action="append", metavar=("NAME", "FILE"), help="a name and its files; repeat it")
    add("--branch-steps", type=int, default=100, help="of each specialist")
    add("--length", type=int, default=256, help="of a row of text, tokens")
    add("--size", type=int, help="of pictures, px; default: 112 of the small ViT's, 224 of others")
    add("--start-steps", type=int, default=600, help="of the small ViT's own training")
    words = {
        "steps": "of each mixture, and of the dense model", "batch": "rows or pictures a step and process",
        "seed": "of the data", "held_out": "rows or pictures of each domain to judge models on",
    }  # fmt: skip
    add_loop_arguments(parser, Path("out/bam"), TEXT, words)
    if parser.parse_args(arguments).vision:
        parser.set_defaults(**VISION)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    accelerator, settings = accelerator_of(args), LoopSettings(**loop_options(args))
    domains: dict[str, list[Path]] = {}
    for name, *files in args.domain or ():
        if name in domains:
            raise ValueError(f"--domain {name!r} twice: give all its files at once")
        domains[name] = [Path(file) for file in files]
    if args.vision:
        # on pictures of its own: what it has seen is nothing new to a specialist
        first = LoopSettings(steps=args.start_steps, batch=16, lr=2e-3, warmup=50, save_every=250, seed=args.seed + 1)
        start = trained_start(accelerator, args.out / "start", first)
        tasks = picture_domains(args.model, domains, size=args.size, start=start)
    else:
        tasks = domains_of(args.model, domains, length=args.length, held_out=args.held_out)
    branch = dataclasses.replace(settings, steps=args.branch_steps)
    found = BamPretraining(accelerator, tasks, settings, branch, args.out).run(resume=args.resume)
    if accelerator.is_main_process:
        print(found.table(), *found.sentences(), *(f"wrote {file}" for file in found.save(args.out)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
