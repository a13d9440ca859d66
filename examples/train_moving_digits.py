"""Train the embedded demo model (a 1.7M-parameter Wan video transformer) on moving handwritten digits, on a CPU.

    python examples/train_moving_digits.py --minutes 74 --threads 1 --compile --out moving_digits

Everything that changes over a run is a function of the elapsed share of --minutes, so it anneals to zero at any speed.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tqdm import tqdm

from attn_plugins.training.moving_digits import empty_prompt, moving_digits, prompt_embeds

SHIFT = 3.0  # neighbouring frames repeat each other, so that the noise must be stronger than for one image to hide them
# (share of the run at which the stage begins, frames, batch): images first, where most digits are seen per second
STAGES = ((0.0, 1, 32), (0.33, 4, 8), (0.55, 8, 4), (0.78, 16, 2))
REHEARSAL = 0.2  # share of later steps that go back to images: 2 videos hold 4 digits, 32 images hold 64
WARMUP, DECAY_FROM = 100, 0.5  # steps (not time: compilation takes a minute before the first); share of the run
EMA = 0.99  # short: the decay of the learning rate already averages
SAVE_EVERY = 300.0  # s


def build_transformer() -> WanTransformer3DModel:
    """A Wan transformer whose 'latents' are grey pixels; heads of 64 as in big models, so it runs their kernels."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 6, "ffn_dim": 512, "freq_dim": 64}
    ends = {"in_channels": 1, "out_channels": 1, "patch_size": (1, 2, 2), "text_dim": 16, "rope_max_seq_len": 64}
    return WanTransformer3DModel(**sizes, **ends, cross_attn_norm=True, qk_norm="rms_norm_across_heads")


def learning_rate(share: float, step: int, peak: float) -> float:
    """Warm up, hold, then fall to zero in a straight line."""
    return peak * min(1.0, (step + 1) / WARMUP, (1 - share) / (1 - DECAY_FROM))


def stage(share: float, generator: torch.Generator) -> tuple[int, int]:
    """Frames and batch of the next step."""
    rehearse = torch.rand((), generator=generator) < REHEARSAL
    return STAGES[0][1:] if rehearse else [sizes for start, *sizes in STAGES if share >= start][-1]


def build_optimizers(model: WanTransformer3DModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (a third fewer steps than AdamW for the same loss here), AdamW for all else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def flow_loss(model, frames: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Flow matching: at x = (1 - s) video + s noise the model predicts noise - video."""
    video, labels = moving_digits(batch, frames, generator=generator)
    prompt = prompt_embeds(labels)
    dropped = torch.rand(batch, 1, 1, generator=generator) < 0.1
    prompt = torch.where(dropped, empty_prompt(batch), prompt)
    # stratified, so that one small batch still covers the noise levels
    s = (torch.rand((), generator=generator) + torch.arange(batch) / batch) % 1.0
    s = (SHIFT * s / (1 + (SHIFT - 1) * s)).view(-1, 1, 1, 1, 1)
    noise = torch.randn(video.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        flow = model((1 - s) * video + s * noise, 1000 * s.flatten(), prompt, return_dict=False)[0]
    return (flow.float() - (noise - video)).square().mean()


def save_log(rows: list, out: Path) -> None:
    """Write the loss curve as a table and as a picture."""
    import matplotlib.pyplot as plt

    with open(out / "training_log.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "minutes", "frames", "loss", "lr"), *rows])
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for frames in sorted({row[2] for row in rows}):
        points = [(row[1], row[3]) for row in rows if row[2] == frames]
        axes.plot(*zip(*points, strict=True), ".", markersize=2, label=f"{frames} frames")
    axes.set(xlabel="minutes", ylabel="flow matching loss", yscale="log")
    axes.legend(markerscale=4)
    figure.savefig(out / "loss.png", dpi=100)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=74.0, help="wall-clock budget of the whole run")
    add("--out", type=Path, default=Path("moving_digits"), help="folder for the pipeline, the log and the checkpoint")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--lr", type=float, default=3e-3)
    add("--compile", action="store_true", help="torch.compile: faster on short videos; needs a compiler")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    generator = torch.Generator().manual_seed(args.seed)
    model, ema = build_transformer(), build_transformer().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    optimizers = build_optimizers(model, args.lr)
    rows, step, spent = [], 0, 0.0
    if args.resume:
        state = torch.load(checkpoint)
        for part, saved_state in zip((model, ema, *optimizers), state["parts"], strict=True):
            part.load_state_dict(saved_state)
        generator.set_state(state["generator"])
        rows, step, spent = state["rows"], state["step"], state["spent"]
    forward = torch.compile(model, dynamic=False) if args.compile else model

    budget, began, saved = 60 * args.minutes, time.monotonic() - spent, spent
    bar = tqdm(total=args.minutes, initial=spent / 60, bar_format="{l_bar}{bar}| {n:.1f}/{total:.0f} min{postfix}")
    while spent < budget:
        lr = learning_rate(spent / budget, step, args.lr)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        frames, batch = stage(spent / budget, generator)
        loss = flow_loss(forward, frames, batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, spent = step + 1, time.monotonic() - began
        decay = min(EMA, step / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        rows.append((step, round(spent / 60, 3), frames, round(loss.item(), 5), float(f"{lr:.3g}")))
        bar.set_postfix_str(f"step {step}, {frames} frames, loss {rows[-1][3]:.4f}", refresh=False)
        bar.update(min(spent / 60, args.minutes) - bar.n)
        if spent - saved > SAVE_EVERY or spent >= budget:
            saved = spent
            state = {"parts": [part.state_dict() for part in (model, ema, *optimizers)], "rows": rows, "step": step}
            state |= {"spent": spent, "generator": generator.get_state()}
            torch.save(state, temporary := checkpoint.with_suffix(".tmp"))
            temporary.replace(checkpoint)
            scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
            WanPipeline(None, None, None, scheduler=scheduler, transformer=ema).save_pretrained(args.out)
            save_log(rows, args.out)
    bar.close()


if __name__ == "__main__":
    main()
