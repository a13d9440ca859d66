"""Branch a language model into specialists, mix them (BTX, BAM), and train the mixtures on, beside the dense model.

    python examples/continue_pretrain_bam.py                              # the embedded Llama: code and prose
    python examples/continue_pretrain_bam.py --resume
    accelerate launch examples/continue_pretrain_bam.py --model Qwen/Qwen2.5-0.5B --domain code code/*.py \\
        --domain law law/*.txt --steps 2000 --branch-steps 2000 --length 1024 --mixed-precision bf16

Into --out go `branches/` (seed and specialists), a folder for each mixture (`start/` as it was upcycled), the dense
runs, `pretrained.json` and `pretrained.png`. docs/continue_tuning.md says what was measured.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator

import attn_plugins  # noqa: F401  # AutoModelForCausalLM knows mixtures then
from attn_plugins.pipelines.continue_pretrain_bam import BamPretraining
from attn_plugins.pipelines.tasks import domains_of
from attn_plugins.training.loop import LoopSettings


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub name of the seed; default: the embedded Llama")
    add("--domain", nargs="+", action="append", metavar=("NAME", "FILE"), help="a name and its text files; repeat it")
    add("--out", type=Path, default=Path("out/bam"))
    add("--resume", action="store_true", help="take up what --out has; to the bit what it had been without a stop")
    add("--checkpointing", action="store_true", help="recompute activations in the backward: slower, less memory")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate launch` says, else no")
    add("--threads", type=int, default=0, help="of the CPU; 0 leaves PyTorch's own choice")
    for name, default, text in (
        ("steps", 100, "of each mixture, and of the dense model"),
        ("branch_steps", 100, "of each specialist"),
        ("batch", 8, "rows a step and process"),
        ("length", 256, "of a row, tokens"),
        ("lr", 3e-4, "peak rate of AdamW"),
        ("seed", 0, "of the data"),
        ("save_every", 50, "steps between checkpoints"),
        ("held_out", 100, "rows of each domain that models are judged on"),
    ):
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text}; default {default}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.accelerator.is_available())
    names = ("steps", "batch", "lr", "seed", "save_every", "held_out", "checkpointing")
    settings = LoopSettings(**{name: getattr(args, name) for name in names})
    domains = {name: [Path(file) for file in files] for name, *files in args.domain or ()}
    tasks = domains_of(args.model, domains, length=args.length, held_out=args.held_out)
    branch = dataclasses.replace(settings, steps=args.branch_steps)
    found = BamPretraining(accelerator, tasks, settings, branch, args.out).run(resume=args.resume)
    if accelerator.is_main_process:
        print(found.table(), *found.sentences(), *(f"wrote {file}" for file in found.save(args.out)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
