"""A byte-level BPE tokenizer: any bytes have tokens, digits stand alone, and a text begins with one special token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START = "<|endoftext|>"  # begins every text, ends it in generation, and fills batches: id 0


def train_tokenizer(texts: Iterable[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Learn merges from `texts` until there are `vocabulary` tokens (257 at least); the same texts, the same tokenizer.

    length: of the model's context, in tokens, for the tokenizer's own warning.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 257:
        raise ValueError(f"vocabulary={vocabulary}: the 256 bytes and {START} need 257 at least")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[START], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": START, "eos_token": START, "pad_token": START}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[int]:
    """All texts in one list of ids, each behind its start token."""
    return [token for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts)) for token in encoding.ids]
