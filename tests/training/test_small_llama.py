"""The embedded language model: its text and tasks, and whether what we ship has learned them."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers")

from attn_plugins.pipelines.small_llama import asset_folder, small_llama
from attn_plugins.training.small_llama import corpus, evaluation, steps
from attn_plugins.training.small_llama.retrieval import ANSWER_WEIGHT, FORMATS, Retrieval, repeated_row
from attn_plugins.training.small_llama.tokenizer import tokenize, train_tokenizer

STATED = {"perplexity": 20.0, "retrieval": 0.6}  # loose: other Pythons have other texts


@pytest.fixture(scope="module")
def shipped():
    return small_llama()


@pytest.fixture(scope="module")
def held_out(shipped) -> list[int]:
    return tokenize(shipped[1], corpus.texts("held_out"))


@pytest.fixture(scope="module")
def tasks(shipped, held_out) -> Retrieval:
    return Retrieval(shipped[1], held_out)


def test_the_splits_are_disjoint_and_decided_by_the_name():
    names = [name for name, _ in corpus.documents()]
    held_out = {name for name in names if corpus.is_held_out(name)}
    assert len(set(names)) == len(names) and "argparse" in names and "pydoc_data.topics.lambda" in names
    assert 0.02 < len(held_out) / len(names) < 0.1
    train, kept = corpus.texts("train"), corpus.texts("held_out")
    assert 0 < len(kept) < len(train) and not {text for text in kept if len(text) > 200}.intersection(train)
    with pytest.raises(ValueError, match="choose 'train' or 'held_out'"):
        corpus.texts("test")


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return 12345\n",
        "",
        " ",
        "\x00\t\r\n",
        "Grüße, 世界 \U0001f40d",
        "".join(map(chr, range(1, 700))),
    ],
)
def test_any_text_survives_the_tokenizer(shipped, text):
    tokenizer = shipped[1]
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert 0 not in ids[1:] and max(ids) < len(tokenizer) == steps.VOCABULARY
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_same_texts_give_the_same_tokenizer():
    texts = ["import this\nimport that 12\n", "this and that and this"]
    first, again = (train_tokenizer(texts, 270, 64) for _ in range(2))
    assert first.get_vocab() == again.get_vocab() and len(first) == 270
    assert len(first("1234", add_special_tokens=False).input_ids) == 4
    with pytest.raises(ValueError, match="vocabulary=256"):
        train_tokenizer(texts, 256, 64)


def test_rows_are_decided_by_their_seed(held_out, tasks):
    stage = steps.Stage(0.0, 96, 6, 0.5, 0.25)
    first, again, other = (steps.batch(stage, held_out, tasks, seed) for seed in ("a", "a", "b"))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    assert first[0].shape == first[1].shape == (6, 97) and (first[0][:, 0] == 0).all()


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_every_answer_of_a_row_can_be_looked_up(shipped, tasks, share):
    """Each weighted-up answer stands earlier in the row, in the record of the same key."""
    for seed in range(12):
        ids, weights = tasks.row(400, share, random.Random(seed))
        assert len(ids) == len(weights) == 400
        answers = [at for at in range(400) if weights[at] == ANSWER_WEIGHT]
        assert answers
        starts = [at for at in answers if weights[at - 1] != ANSWER_WEIGHT]
        for start in starts:
            end = start
            while end < 400 and weights[end] == ANSWER_WEIGHT:
                end += 1
            value = shipped[1].decode(ids[start:end]).rstrip("\n.")
            assert value and value in shipped[1].decode(ids[:start])


@pytest.mark.parametrize("layout", FORMATS)
def test_a_needle_stands_at_its_depth(shipped, tasks, layout):
    depths = []
    for depth in (0.0, 0.5, 1.0):
        prompt, value = tasks.needle(600, depth, random.Random(3), others=0, layout=layout)
        assert len(prompt) == 600
        at = [i for i in range(600) if prompt[i : i + len(value)] == value]
        assert len(at) == 1  # the question does not say it
        depths.append(at[0] / 600)
    assert depths[0] < 0.05 and 0.4 < depths[1] < 0.6 and 0.9 < depths[2] < 1


def test_a_needle_that_does_not_fit_is_named(tasks):
    with pytest.raises(ValueError, match="records and questions take"):
        tasks.needle(40, 0.5, random.Random(0))


def test_repeated_rows_repeat():
    ids, weights = repeated_row(100, 50, random.Random(1))
    period = next(p for p in range(8, 51) if all(ids[i] == ids[i - p] for i in range(p + 1, 100)))
    assert len(ids) == len(weights) == 100 and [weight == 1 for weight in weights] == [i > period for i in range(100)]


def test_the_loss_and_its_gradient_are_autograds():
    torch.manual_seed(1)
    logits = torch.randn(3, 50, 40, requires_grad=True)
    labels, weights = torch.randint(0, 40, (3, 50)), torch.rand(3, 50)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    ((expected * weights.flatten()).sum() / weights.sum()).backward()
    losses, gradient = steps.token_losses(logits.detach(), labels, weights, chunk=16)
    torch.testing.assert_close(losses.flatten(), expected.detach())
    torch.testing.assert_close(gradient, logits.grad)


def test_the_schedule_ends_at_zero_and_covers_the_context():
    assert steps.learning_rate(0.0, 0, 1.0) < 0.05 and steps.learning_rate(0.3, 999, 1.0) == 1
    assert steps.learning_rate(1.0, 999, 1.0) == 0
    assert steps.stage_at(0.0) == steps.STAGES[0] and steps.stage_at(1.0).length == steps.CONTEXT


def test_the_asset_is_small_and_stock(shipped):
    model, tokenizer = shipped
    assert sum(file.stat().st_size for file in asset_folder().rglob("*.safetensors")) <= 12 * 2**20
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32 and not model.training
    config, attention = model.config, model.model.layers[0].self_attn
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 32)
    assert attention.q_proj.weight.shape == (256, 256) and attention.k_proj.weight.shape == (128, 256)
    assert config.max_position_embeddings == tokenizer.model_max_length == steps.CONTEXT
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_model_foresees_held_out_text_and_uses_its_context(shipped, held_out):
    losses = evaluation.text_losses(shipped[0], held_out, 1024, 6)
    mean, low, high = evaluation.perplexity(losses)
    assert low < mean < high and mean < STATED["perplexity"]
    assert losses[:, 512:].mean() < losses[:, 16:128].mean()  # what was said before helps
    with pytest.raises(ValueError, match="give a longer text"):
        evaluation.text_losses(shipped[0], held_out[:10], 11, 2)


@pytest.mark.parametrize("depth", [0.0, 0.5, 0.9])
def test_the_model_finds_values(shipped, tasks, depth):
    """By chance: one of 423 words, of 10,000 numbers, or two words; of the eight values in the prompt, 1/8."""
    assert evaluation.retrieval_accuracy(shipped[0], tasks, 1024, depth, 12) >= STATED["retrieval"]


def test_it_generates_the_value_of_a_key(shipped):
    model, tokenizer = shipped
    prompt = tokenizer(
        "\nname state: 4719\n\nvalue line: 2280\n\nmodule error: 5163\n\nname state:", return_tensors="pt"
    )
    written = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(written) == " 4719"
