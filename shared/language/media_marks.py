"""Where an image or a clip stands in a chat: one character of private use a medium, which becomes one special token.

Nobody but a processor writes these characters; what people wrote is refused if it has one, so no text can pretend to be
a medium.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Message

MARKS = {"audio": "\U00100000", "image": "\U00100001", "video": "\U00100002"}
"""Modality to the character that stands for one item of it while a chat is rendered."""

ANY_MARK = re.compile(f"([{''.join(MARKS.values())}])")


class MediaTokens:
    """The part of a tokenizer that knows which token stands for a medium. Tokenizers inherit it."""

    media: dict[str, str]
    """Mark to the name of its special token; empty until a model that takes media names them."""

    def name_media(self, modality: str, name: str) -> int:
        """Add the special token that stands for one item of a modality, and return its id."""
        self.media = {**getattr(self, "media", {}), MARKS[modality]: name}
        return self.add_tokens([name])[0]  # type: ignore[attr-defined]

    def encode_marked(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a text, its marks as their special tokens.

        Raises:
            BadDataError: for a mark of a medium that the model does not take.
        """
        ids: list[int] = []
        for piece in ANY_MARK.split(text):
            if piece in MARKS.values():
                ids += self.add_tokens([self.media_name(piece)])  # type: ignore[attr-defined]
            elif piece:
                ids += encode(piece)
        return ids

    def media_name(self, mark: str) -> str:
        """The name of the special token of a mark."""
        known = getattr(self, "media", {})
        if mark not in known:
            kind = next(modality for modality, character in MARKS.items() if character == mark)
            raise BadDataError(f"this model takes no {kind}, and a message has some")
        return known[mark]


def mark_media(messages: Sequence[Message]) -> list[Message]:
    """The chat with a mark in place of each medium, as text alone.

    Raises:
        BadDataError: for a text with a mark in it.
    """
    out: list[Message] = []
    for message in messages:
        parts = []
        for content in message["content"]:
            if content["type"] != "text":
                parts.append(MARKS[content["type"]])
            elif ANY_MARK.search(content["value"]):
                raise BadDataError(
                    "a message holds a character of Unicode's last private plane, which stands for media"
                )
            else:
                parts.append(content["value"])
        out.append({"role": message["role"], "content": [{"type": "text", "value": "".join(parts)}]})
    return out
