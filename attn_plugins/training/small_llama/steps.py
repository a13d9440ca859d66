"""What a training step of the embedded language model is: stages, batches, learning rate, optimizers and the loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from attn_plugins.training.small_llama.retrieval import Retrieval, repeated_row

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CONTEXT = 4096
VOCABULARY = 2048
WARMUP, DECAY_FROM = 60, 0.6  # steps; share of the run


class Stage(NamedTuple):
    """From which share of the run on, tokens a row, rows a step, and the shares of rows that are not running text."""

    start: float
    length: int
    rows: int
    retrieval: float
    repeated: float


# Short rows first: most steps for the time, and many records within reach, from which looking up is learned.
STAGES = (
    Stage(0.00, 256, 16, 0.40, 0.25),
    Stage(0.17, 256, 16, 0.45, 0.05),
    Stage(0.47, 1024, 4, 0.40, 0.05),
    Stage(0.58, 2048, 2, 0.40, 0.0),
    Stage(0.87, 4096, 1, 0.50, 0.0),
)


def build_model() -> LlamaForCausalLM:
    """A LlamaForCausalLM with new weights: 4 layers, 8 query heads and 4 KV heads of 32, a context of 4,096 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    # a larger base than 10,000: with 16 frequencies a head, enough of them stay still over the whole context
    positions = {"max_position_embeddings": CONTEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **positions, **ids, tie_word_embeddings=True))
    model.model.embed_tokens.padding_idx = None  # token 0 begins every row, too: it must learn
    return model


def stage_at(share: float) -> Stage:
    """The stage at this share (0 to 1) of the run."""
    return [stage for stage in STAGES if share >= stage.start][-1]


def learning_rate(share: float, step: int, peak: float) -> float:
    """Warm up, hold, then fall to zero in a straight line."""
    return peak * min(1.0, (step + 1) / WARMUP, (1 - share) / (1 - DECAY_FROM))


def batch(stage: Stage, text: Sequence[int], tasks: Retrieval, seed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one step: ids (rows, length + 1) and the loss's weights, all from `seed`.

    Text rows stand behind a start token, wherever they begin: the model learns that position 0 is always the same.
    """
    rng, length = random.Random(seed), stage.length + 1
    drawn = []
    for _ in range(stage.rows):
        kind = rng.random()
        if kind < stage.retrieval:
            # from rows that are records only to rows with a few records in much text
            drawn.append(tasks.row(length, rng.uniform(0.1, 1.0) ** (1 if length < 1000 else 2), rng))
        elif kind < stage.retrieval + stage.repeated:
            drawn.append(repeated_row(length, VOCABULARY, rng))
        else:
            at = rng.randrange(len(text) - length)
            drawn.append(([tasks.start, *text[at : at + length - 1]], [1.0] * length))
    ids, weights = zip(*drawn, strict=True)
    return torch.tensor(ids), torch.tensor(weights)


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding (which is the output too) and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


@torch.no_grad()
def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, chunk: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses per token (rows, length), and the gradient of their weighted mean with respect to the logits.

    Both in one pass, a few rows at a time: a third of the time of autograd's cross entropy, which makes float32 copies
    of all logits. logits: (rows, length, vocabulary). labels, weights: (rows, length).
    """
    flat, gradient = logits.flatten(0, 1), torch.empty_like(logits)
    labels, share = labels.flatten()[:, None], (weights / weights.sum()).flatten()[:, None]
    losses = []
    for at in range(0, len(flat), chunk):
        part = slice(at, at + chunk)
        log_probabilities = flat[part].float().log_softmax(-1)
        losses.append(-log_probabilities.gather(1, labels[part]))
        delta = log_probabilities.exp_().scatter_add_(1, labels[part], -torch.ones_like(share[part]))
        gradient.flatten(0, 1)[part] = delta.mul_(share[part])
    return torch.cat(losses).view(weights.shape), gradient
