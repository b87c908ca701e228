"""Whole words as tokens, and bytes for what is no known word: a vocabulary for small models of narrow subjects."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.language.byte_tokenizer import ByteTokenizer

PIECE = re.compile(r" ?(?:</?\w+>|\w+|[^\w\s])|\s")
"""A tag, a word or a sign, with the space before it."""


class WordTokenizer(ByteTokenizer):
    """Tokens are the words of a list, each also with a space before it; any other text is spelt in bytes.

    Nothing is lost: the text of the ids is the text that was encoded.

    Args:
        words: words, signs, and tags such as ``<think>``, each once.
        name: begins the key.

    Attributes:
        pad_id, eos_id, stop_ids, vocab_size, key: as in the protocol Tokenizer.

    Raises:
        ConfigError: for a word that the pattern would cut, or that comes twice.
    """

    def __init__(self, words: Sequence[str], name: str = "words"):
        wrong = [word for word in words if PIECE.fullmatch(word) is None or word != word.strip()]
        if wrong or len(set(words)) < len(words):
            raise ConfigError(
                f"the words of a tokenizer are single ones, each once; not {', '.join(wrong[:5]) or 'so'}"
            )
        super().__init__()
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
        self.key = f"{name}-{digest}"
        first = super().vocab_size
        self._words = {form: first + i for i, form in enumerate(f for word in words for f in (word, f" {word}"))}
        self._texts = {i: text for text, i in self._words.items()}

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return super().vocab_size + len(getattr(self, "_words", ()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are never read from it."""
        ids: list[int] = []
        at = 0
        for match in PIECE.finditer(text):
            ids += self._spell(text[at : match.start()]) + self._piece(match[0])
            at = match.end()
        return ids + self._spell(text[at:])

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens are left out, broken UTF-8 is replaced."""
        out, spelt = [], []
        for i in ids:
            if i in self._texts:
                out += [bytes(spelt).decode(errors="replace"), self._texts[i]]
                spelt = []
            elif i < 256:
                spelt.append(i)
        return "".join([*out, bytes(spelt).decode(errors="replace")])

    def _piece(self, text: str) -> list[int]:
        return [self._words[text]] if text in self._words else self._spell(text)

    @staticmethod
    def _spell(text: str) -> list[int]:
        return list(text.encode())


@cache
def word_list(name: str) -> tuple[str, ...]:
    """The words of ``shared/language/words/NAME.txt``.

    Raises:
        ConfigError: if there is no such list.
    """
    folder = files("bestiary.shared.language") / "words"
    file = folder / f"{name}.txt"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".txt") for f in folder.iterdir() if f.name.endswith(".txt"))
        raise ConfigError(f"there is no list of words {name!r}; there are: {', '.join(known)}")
    return tuple(file.read_text().split())
