"""Key-value retrieval: records such as `amber door: 4719` scattered in text, then a question for one of the keys.

Keys are pairs of words, so that a row's records share words and only the pair decides. Values are a word, two words or
four digits. Everything is drawn from the `random.Random` that is given: the same seed, the same rows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# name: record, question, what follows the value in both, what joins the words of a key
FORMATS = {
    "colon": ("\n{key}: {value}\n", "\n{key}:", "\n", " "),
    "prose": ("\nThe {key} is {value}.\n", "\nWhat is the {key}? The {key} is", ".\n", " "),
    "code": ("\nlet {key} = {value}\n", "\n>>> {key}\n=>", "\n", "_"),
    "register": ("\nline {key}: the register holds {value}\n", "\nWhat does line {key} hold? It holds", "\n", " "),
}
ANSWER_WEIGHT = 5.0  # answers are few, and all that is learned about looking far is learned from them
NOISE_WEIGHT = 0.05  # of random keys and values: nobody can foresee them


class Item(NamedTuple):
    """A piece of a row: where it stands (0 to 1 among the text, above 1 behind it), its tokens, the loss's weights."""

    place: float
    ids: list[int]
    weights: list[float]


class Pair(NamedTuple):
    """Tokens of a record, of the question for it, of its value, and of what ends the answer."""

    record: list[int]
    question: list[int]
    value: list[int]
    end: list[int]


class Retrieval:
    """Draws retrieval rows in the tokens of one tokenizer.

    text: ids of the text that stands between the records (split it yourself: it is copied as it is).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: Sequence[int]) -> None:
        self.text = text
        self.start = tokenizer.bos_token_id
        self.encode: Callable[[str], list[int]] = lambda piece: (
            tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        )
        self.words = sorted(token[1:] for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{3,}", token))

    def _value(self, rng: random.Random) -> str:
        words = " ".join(rng.sample(self.words, 2))
        return rng.choice((words.split()[0], words, "".join(rng.choices("0123456789", k=4))))

    def _pair(self, layout: str, rng: random.Random, taken: set[str]) -> Pair:
        """A record whose key is not in `taken` yet, and its question."""
        record, question, end, joint = FORMATS[layout]
        while (key := joint.join(rng.sample(self.words, 2))) in taken:
            pass
        taken.add(key)
        value = self._value(rng)
        pieces = record.format(key=key, value=value), question.format(key=key), f" {value}", end
        return Pair(*map(self.encode, pieces))

    def _assemble(self, items: list[Item], length: int, rng: random.Random) -> tuple[list[int], list[float]]:
        """A row of `length` tokens: the start token, the items by place, running text in the gaps before place 1."""
        items = sorted(items, key=lambda item: item.place)
        room = length - 1 - sum(len(item.ids) for item in items)
        if not 0 <= room < len(self.text):
            raise ValueError(
                f"{length} tokens, {len(self.text)} of text: records and questions take {length - 1 - room}"
            )
        offset = rng.randrange(len(self.text) - room)
        ids, weights, used = [self.start], [0.0], 0
        for item in items:
            until = max(used, min(round(item.place * room), room))
            for piece, piece_weights in (
                (self.text[offset + used : offset + until], [1.0] * (until - used)),
                (item.ids, item.weights),
            ):
                ids += piece
                weights += piece_weights
            used = until
        ids += self.text[offset + used : offset + room]
        return ids, weights + [1.0] * (room - used)

    def row(self, length: int, share: float, rng: random.Random) -> tuple[list[int], list[float]]:
        """A training row: `length` ids and loss weights; about `share` of the tokens are records and questions.

        Half of the questions stand behind all text, the others anywhere between their record and its end.
        """
        layout, taken, items, used = rng.choice(tuple(FORMATS)), set[str](), [], 0
        while used < share * length:
            record, question, value, end = self._pair(layout, rng, taken)
            answer = value + end
            used += len(record) + len(question) + len(answer)
            if used > length - 1:
                break
            place = rng.random()
            asked = 1 + rng.random() if rng.random() < 0.5 else rng.uniform(place, 1)
            items.append(Item(place, record, [NOISE_WEIGHT] * len(record)))
            weights = [NOISE_WEIGHT] * len(question) + [ANSWER_WEIGHT] * len(answer)
            items.append(Item(asked, question + answer, weights))
        return self._assemble(items, length, rng)

    def needle(
        self, length: int, depth: float, rng: random.Random, *, others: int = 7, layout: str | None = None
    ) -> tuple[list[int], list[int]]:
        """An evaluation prompt of `length` tokens with one question at its end, and the tokens of the right value.

        depth: where the record stands, 0 (behind the start token) to 1 (before the question). others: how many more
        records of the same layout stand anywhere. layout: one of FORMATS; None draws one.
        """
        layout, taken = layout or rng.choice(tuple(FORMATS)), set[str]()
        record, question, value, _ = self._pair(layout, rng, taken)
        items = [Item(depth, record, [0.0] * len(record)), Item(2.0, question, [0.0] * len(question))]
        for _ in range(others):
            other = self._pair(layout, rng, taken).record
            items.append(Item(rng.random(), other, [0.0] * len(other)))
        return self._assemble(items, length, rng)[0], value


def repeated_row(length: int, vocabulary: int, rng: random.Random) -> tuple[list[int], list[float]]:
    """Random tokens and the same again (and again): what it takes to form heads that look up an earlier occurrence."""
    period = rng.randint(8, length // 2)
    pattern = [rng.randrange(1, vocabulary) for _ in range(period)]
    ids = [0, *(pattern * (length // period + 1))][:length]
    return ids, [NOISE_WEIGHT if at <= period else 1.0 for at in range(length)]
