"""Train the embedded base of examples/train_mip.py, and a stock IP-Adapter for it, on a CPU.

    python examples/train_two_objects.py --out two_objects

UNet and text encoder learn pictures of one and two objects by their names alone, without the adapter; along with them
the adapter and its image encoder learn pictures of one object beside a reference. Nothing here sees two references.

From the pictures alone so small a model takes long to find out which name is which shape. So its cross-attention is
told, by the share of each name's relevance that falls onto its object; large models do without.
"""

import argparse
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from attn_plugins.training import two_objects_model as small
from attn_plugins.training.seeds import seeded
from attn_plugins.training.two_objects import DrawnObjects

PAIRS = 0.8  # share of the pictures without a reference that show two objects
BARE, DROPPED = 0.1, 0.1  # prompts of one object that are its name without "a"; empty ones
NO_IMAGE = 0.1  # of the pictures with a reference
EMA, WARMUP, DECAY = 0.995, 100, 0.4  # the last share of the steps falls to a rate of zero
RELEVANCE = 0.1  # weight of - log of that share, mean over layers
MOST_WEIGHT = 5.0  # of a noise level: 1 + its signal-to-noise ratio, at most


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("two_objects"), help="folder of the pipeline, the adapter and the log")
    add("--steps", type=int, default=3000)
    add("--batch", type=int, nargs=2, default=(12, 6), help="pictures without and with a reference")
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--save-every", type=int, default=50)
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args(arguments)


def prompts(items: list, generator: torch.Generator) -> list[str]:
    """What the pictures show, said in full, or barely, or not at all."""
    chances = torch.rand(len(items), 2, generator=generator).tolist()
    found = []
    for item, (dropped, bare) in zip(items, chances, strict=True):
        said = item.names[0] if bare < BARE and len(item.names) == 1 else item.prompt
        found.append("" if dropped < DROPPED else said)
    return found


class Trainer:
    """Models and data; `loss` is that of a step."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.data = args, DrawnObjects(args.seed)
        self.tokens, self.scheduler = small.tokenizer(), small.scheduler()
        self.unet, self.text, self.vision = small.unet(), small.text_encoder(self.tokens), small.image_encoder()
        small.load_new_adapter(self.unet, args.seed)
        self.unet.requires_grad_(True)
        self.models = {"unet": self.unet, "text": self.text, "vision": self.vision}
        self.inputs: list = []  # (module, its input) of each cross-attention in the last forward
        for module in self.unet.modules():
            if hasattr(getattr(module, "processor", None), "to_k_ip"):
                module.register_forward_pre_hook(lambda module, args: self.inputs.append((module, args[0])))
        self.learned = [p for model in self.models.values() for p in model.parameters()]

    def loss(self, step: int) -> torch.Tensor:
        (plain, seen), losses = self.args.batch, []
        for kind, count in (("plain", plain), ("seen", seen)):
            generator = seeded(self.args.seed, kind, step)
            numbers = range(step * count, (step + 1) * count)
            if kind == "seen":
                items = [self.data.item(number, 1) for number in numbers]
            else:
                pairs = (torch.rand(count, generator=generator) < PAIRS).tolist()
                items = [self.data.scene("train", n, 1 + two) for n, two in zip(numbers, pairs, strict=True)]
            losses.append(self.one(items, generator, None if kind == "seen" else RELEVANCE) * count)
        return sum(losses) / (plain + seen)

    def one(self, items: list, generator: torch.Generator, relevance: float | None) -> torch.Tensor:
        seen = relevance is None
        latents = small.to_latents(torch.stack([item.picture for item in items]))
        even = (torch.rand((), generator=generator) + torch.arange(len(items)) / len(items)) % 1.0
        times = (even * self.scheduler.config.num_train_timesteps).long()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = self.scheduler.add_noise(latents, noise, times)
        ids = self.tokens(prompts(items, generator), padding="max_length", return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            images = torch.zeros(len(items), small.EMBEDDING)
            if seen:
                images = self.vision(2 * torch.cat([item.references for item in items]) - 1).image_embeds
                images = images * (torch.rand(len(items), 1, generator=generator) >= NO_IMAGE)
            for processor in self.unet.attn_processors.values():
                if hasattr(processor, "to_k_ip"):
                    processor.scale = [float(seen)]
            more = {"image_embeds": [images[:, None]]}
            self.inputs.clear()
            found = self.unet(noisy, times, self.text(ids)[0], added_cond_kwargs=more, return_dict=False)[0]
        weight = (1 / (1 - self.scheduler.alphas_cumprod[times])).clamp_max(MOST_WEIGHT)
        error = ((found.float() - latents).square().mean((1, 2, 3)) * weight).mean()
        return error if relevance is None else error + relevance * self.astray(items)

    def astray(self, items: list) -> torch.Tensor:
        """- log of the share of each name's relevance that is on its object, mean over names and layers; the relevance
        is MIP's, of the name alone: a softmax over positions."""
        names = [name for item in items for name in item.names]
        rows = torch.tensor([row for row, item in enumerate(items) for _ in item.names])
        masks = F.interpolate(torch.cat([item.masks for item in items])[:, None], size=small.GRID, mode="area")
        keys = self.text(self.tokens(names, padding="max_length", return_tensors="pt").input_ids)[0][:, 1]
        shares = []
        for attn, hidden in self.inputs:
            q, k = (t.unflatten(-1, (attn.heads, -1)) for t in (attn.to_q(hidden.float())[rows], attn.to_k(keys)))
            relevance = torch.softmax(torch.einsum("nshd,nhd->nhs", q, k) * q.shape[-1] ** -0.5, dim=-1).mean(1)
            shares.append((relevance * masks.flatten(1)).sum(1))
        return -torch.stack(shares).clamp_min(1e-6).log().mean()


def save_log(rows: list, out: Path) -> None:
    """The losses as a table and as a picture."""
    from matplotlib.figure import Figure

    with open(out / "training_log.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "lr"), *rows])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([row[0] for row in rows], [row[1] for row in rows], ".", markersize=2)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(out / "loss.png", dpi=80)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    trainer = Trainer(args)
    learned, rows = trainer.learned, []
    optimizer = torch.optim.AdamW(learned, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    mean = [p.detach().clone() for p in learned]
    if args.resume and checkpoint.is_file():
        state = torch.load(checkpoint)
        rows, mean = state["rows"], state["mean"]
        optimizer.load_state_dict(state["optimizer"])
        for parameter, saved in zip(learned, state["now"], strict=True):
            parameter.data.copy_(saved)
    bar = tqdm(total=args.steps, initial=len(rows), mininterval=10)
    for step in range(len(rows), args.steps):
        rate = args.lr * min(1.0, (step + 1) / WARMUP, (1 - step / args.steps) / DECAY)
        optimizer.param_groups[0]["lr"] = rate
        with sdpa_kernel(SDPBackend.MATH):  # rows are short: the backward of the other one is slower
            found = trainer.loss(step)
            found.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(mean, [p.detach() for p in learned], 1 - min(EMA, (step + 1) / (step + 10)))
        rows.append((step + 1, round(found.item(), 5), float(f"{rate:.3g}")))
        bar.set_postfix_str(f"loss {rows[-1][1]:.4f}", refresh=False)
        bar.update()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"now": learned, "mean": mean, "optimizer": optimizer.state_dict(), "rows": rows}
            torch.save(state, temporary := checkpoint.with_suffix(".tmp"))
            temporary.replace(checkpoint)
    bar.close()
    for parameter, average in zip(learned, mean, strict=True):
        parameter.data.copy_(average)
    save_log(rows, args.out)
    small.save(args.out, trainer.unet, trainer.text, trainer.tokens, trainer.vision)


if __name__ == "__main__":
    main()
