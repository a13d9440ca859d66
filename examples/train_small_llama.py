"""Train the embedded language model (a 3.7M-parameter Llama) on Python's own texts and key-value retrieval, on a CPU.

    python examples/train_small_llama.py --minutes 75 --out small_llama
    python examples/train_small_llama.py --minutes 150 --out small_llama --resume small_llama/stable.pt   # go on

The budget is the process's own CPU time, so pausing it costs nothing; every step draws its data from the seed and its
number. `checkpoint.pt` is the newest state, `stable.pt` the last one before the learning rate fell: go on from that.
"""

import argparse
import copy
import csv
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

from attn_plugins.training.small_llama import corpus, evaluation, steps
from attn_plugins.training.small_llama.retrieval import ANSWER_WEIGHT, Retrieval
from attn_plugins.training.small_llama.tokenizer import tokenize, train_tokenizer

SAVE_EVERY = 240.0  # s


def save_log(rows: list, out: Path) -> None:
    """Write the loss curve as a table and as a picture."""
    import matplotlib.pyplot as plt

    with open(out / "training_log.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [("step", "minutes", "length", "loss", "text", "answers", "lr"), *rows]
        )
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for column, name in ((4, "running text"), (5, "answers of retrieval")):
        points = [(row[1], row[column]) for row in rows if row[column] == row[column]]
        axes.plot(*zip(*points, strict=True), ".", markersize=2, label=name)
    begins = {row[2]: row[1] for row in reversed(rows)}
    for length, minutes in begins.items():
        axes.axvline(minutes, color="grey", linewidth=0.5)
        axes.annotate(f" {length}", (minutes, 0.97), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.set(xlabel="minutes of CPU time (lines: tokens a row from there on)", ylabel="nats a token", ylim=(0, 8))
    axes.legend(markerscale=4, loc=(0.14, 0.8))
    figure.savefig(out / "loss.png", dpi=100)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=75.0, help="CPU time of the whole run, what a resumed one has spent included")
    add("--out", type=Path, default=Path("small_llama"), help="folder for the model, the log and the checkpoints")
    add("--resume", type=Path, help="continue from this checkpoint")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--lr", type=float, default=3e-3)
    add("--compile", action="store_true", help="torch.compile: needs a compiler, and a minute for every length")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))  # ends after the step, saved

    texts = corpus.texts("train")
    tokenizer = train_tokenizer(texts, steps.VOCABULARY, steps.CONTEXT)
    tokenizer.save_pretrained(args.out)
    text = tokenize(tokenizer, texts)
    print(f"{sum(map(len, texts)):,} characters, {len(text):,} tokens", flush=True)
    tasks, model = Retrieval(tokenizer, text), steps.build_model()
    optimizers = steps.build_optimizers(model, args.lr)
    rows, step, spent, decayed = [], 0, 0.0, False
    if args.resume:
        state = torch.load(args.resume)
        for part, saved_state in zip((model, *optimizers), state["parts"], strict=True):
            part.load_state_dict(saved_state)
        rows, step, spent, decayed = state["rows"], state["step"], state["spent"], state["decayed"]
    forward = torch.compile(model, dynamic=False) if args.compile else model

    budget, began, saved = 60 * args.minutes, time.process_time() - spent, spent
    bar = tqdm(total=args.minutes, bar_format="{l_bar}{bar}| {n:.1f}/{total:.0f} min{postfix}", mininterval=20)
    while spent < budget and not stopped:
        share = spent / budget
        lr = steps.learning_rate(share, step, args.lr)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        stage = steps.stage_at(share)
        ids, weights = steps.batch(stage, text, tasks, f"train {args.seed} {step}")
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(ids[:, :-1], use_cache=False).logits
        weights = weights[:, 1:]
        losses, gradient = steps.token_losses(logits.detach(), ids[:, 1:], weights)
        logits.backward(gradient)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, spent = step + 1, time.process_time() - began
        answers, plain = losses[weights == ANSWER_WEIGHT].mean().item(), losses[(weights == 1).all(1)].mean().item()
        mean = (losses * weights).sum().item() / weights.sum().item()
        logged = (round(value, 4) for value in (mean, plain, answers))
        rows.append((step, round(spent / 60, 3), stage.length, *logged, float(f"{lr:.3g}")))
        bar.set_postfix_str(f"step {step}, {stage.length} long, text {plain:.3f}, answers {answers:.3f}", refresh=False)
        bar.update(min(spent / 60, args.minutes) - bar.n)
        leaving = not decayed and spent / budget >= steps.DECAY_FROM
        if leaving or spent - saved > SAVE_EVERY or spent >= budget or stopped:
            saved = spent
            state = {"parts": [part.state_dict() for part in (model, *optimizers)], "rows": rows, "step": step}
            torch.save(state | {"spent": spent, "decayed": decayed}, temporary := args.out / "checkpoint.tmp")
            temporary.replace(args.out / ("stable.pt" if leaving else "checkpoint.pt"))
            decayed = decayed or leaving
            copy.deepcopy(model).half().save_pretrained(args.out)  # half the size, and the same to three digits
            save_log(rows, args.out)
    bar.close()
    if not stopped:
        held_out = tokenize(tokenizer, corpus.texts("held_out"))
        (args.out / "evaluation.md").write_text(evaluation.report(model.eval(), tokenizer, held_out))


if __name__ == "__main__":
    main()
