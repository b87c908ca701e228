"""A tokenizer that needs no file: the 256 bytes, and a few special tokens above them."""

from __future__ import annotations

from collections.abc import Sequence

from bestiary.shared.core.examples import Message
from bestiary.shared.language.chat_templates import ROLES, message_text
from bestiary.shared.language.media_marks import MediaTokens


class ByteTokenizer(MediaTokens):
    """UTF-8 bytes as tokens 0–255; ``<pad>``, ``<eos>`` and one token a role after them.

    Attributes:
        pad_id, eos_id: special tokens. vocab_size: all tokens, added ones included.
    """

    key = "byte"

    def __init__(self) -> None:
        self._specials = {name: 256 + i for i, name in enumerate(("<pad>", "<eos>", *(f"<{r}>" for r in ROLES)))}
        self.pad_id, self.eos_id = self._specials["<pad>"], self._specials["<eos>"]
        self.stop_ids = (self.eos_id,)

    @property
    def added_tokens(self) -> list[str]:
        """Names that :meth:`add_tokens` brought, in order."""
        return list(self._specials)[2 + len(ROLES) :]

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return 256 + len(self._specials)

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text; special tokens are never read from text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the byte tokens; special tokens are left out, broken UTF-8 is replaced."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens (known ones keep their id) and return their ids."""
        for name in names:
            self._specials.setdefault(name, self.vocab_size)
        return [self._specials[name] for name in names]

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a chat, and which of them the assistant wrote (its end token included).

        Each turn is ``<role> text <eos>``.

        Args:
            messages: text turns.
            add_generation_prompt: end with the assistant's role token.
            thinking: not used; this template has no thoughts.

        Raises:
            BadDataError: for an unknown role, or content other than text.
        """
        ids: list[int] = []
        own: list[bool] = []
        for message in messages:
            role = message["role"]
            body = self.encode_marked(message_text(message), self.encode) + [self.eos_id]
            ids += [self._specials[f"<{role}>"], *body]
            own += [False] + [role == "assistant"] * len(body)
        if add_generation_prompt:
            ids.append(self._specials["<assistant>"])
            own.append(False)
        return ids, own
