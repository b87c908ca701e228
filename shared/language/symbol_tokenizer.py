"""A tokenizer whose tokens are the characters of a given string: for small made-up tasks such as addition."""

from __future__ import annotations

from collections.abc import Sequence

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Message
from bestiary.shared.language.chat_templates import message_text
from bestiary.shared.language.media_marks import MediaTokens

UNKNOWN = "\ufffd"


class SymbolTokenizer(MediaTokens):
    """One token a symbol, numbered in the order given; ``<pad>`` and ``<eos>`` after them.

    A chat has no role tokens: a turn is its text, and only the assistant's ends with ``<eos>``. So ``37+58=`` is a
    prompt of six tokens, and its answer ``095`` is three and the end token.

    Args:
        symbols: the characters, each once.

    Attributes:
        pad_id, eos_id, stop_ids, vocab_size: as in the protocol Tokenizer. key: holds the symbols.

    Raises:
        ConfigError: if there are no symbols, or one comes twice.
    """

    def __init__(self, symbols: str):
        if not symbols:
            raise ConfigError("a symbol tokenizer needs symbols: symbols:0123456789+=, for example")
        twice = sorted({s for s in symbols if symbols.count(s) > 1})
        if twice:
            raise ConfigError(f"the tokenizer symbols:{symbols} names {', '.join(map(repr, twice))} more than once")
        self.symbols, self.key = symbols, f"symbols:{symbols}"
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}
        self._specials = {"<pad>": len(symbols), "<eos>": len(symbols) + 1}
        self.pad_id, self.eos_id = self._specials["<pad>"], self._specials["<eos>"]
        self.stop_ids = (self.eos_id,)

    @property
    def added_tokens(self) -> list[str]:
        """Names that :meth:`add_tokens` brought, in order."""
        return list(self._specials)[2:]

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.symbols) + len(self._specials)

    def encode(self, text: str) -> list[int]:
        """The token of each character.

        Raises:
            BadDataError: for a character that is no symbol; the message names it.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise BadDataError(
                f"the character {error.args[0]!r} of {text[:60]!r} is not among the tokenizer's symbols "
                f"{self.symbols!r}. Add it to them, or use another tokenizer"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens are left out.

        An embedding may be padded to more rows than there are tokens. Such an id becomes U+FFFD and is not left out:
        a text with one must not be taken for the text without it.
        """
        size, known = len(self.symbols), self.vocab_size
        return "".join(self.symbols[i] if i < size else UNKNOWN for i in ids if not size <= i < known)

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens (known ones keep their id) and return their ids."""
        for name in names:
            self._specials.setdefault(name, self.vocab_size)
        return [self._specials[name] for name in names]

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a chat, and which of them the assistant wrote (its end token included).

        Args:
            messages: text turns.
            add_generation_prompt: adds nothing: an answer begins where the text before it ends.
            thinking: not used; there are no thoughts.

        Raises:
            BadDataError: for an unknown role, content other than text, or a character that is no symbol.
        """
        ids: list[int] = []
        own: list[bool] = []
        for message in messages:
            mine = message["role"] == "assistant"
            body = self.encode_marked(message_text(message), self.encode) + [self.eos_id] * mine
            ids += body
            own += [mine] * len(body)
        return ids, own
