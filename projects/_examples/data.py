"""tiny_talk: text and chat for a first language model, out of what Python itself brings along."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.splits import split_of

WORDS = tuple(
    "apple bread chair dance eagle flame grape house image juice knife lemon mouse night ocean piano queen river "  # noqa: SIM905
    "stone table uncle voice water yacht zebra amber brick cloud dream earth field glass heart ivory jewel karma "
    "light money noise olive paper quiet radio sugar tiger union valve wheat youth".split()
)


class TinyTalk:
    """Two parts: ``text``, the help topics of this Python (``pydoc_data``), and ``chat``, small tasks on words.

    Topics are held out by the hash of their name. Chat tasks are held out by the hash of their question, so that no
    question of a held-out part is ever trained on.

    Args:
        window: bytes of a text sample.
        held_out_chats: how many chats each held-out split has.
    """

    def __init__(self, window: int = 256, held_out_chats: int = 64):
        self.window, self.held_out_chats = window, held_out_chats

    @cached_property
    def topics(self) -> dict[str, str]:
        """Topic name to text."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise MissingDataError(
                "this Python has no pydoc_data (some distributions split it off); install its standard library whole"
            ) from error
        return {name: text for name, text in sorted(topics.items()) if len(text) > 200}

    @cached_property
    def revision(self) -> str:
        """Hash of the topics; they differ between versions of Python."""
        text = "\0".join(f"{k}\0{v}" for k, v in self.topics.items())
        return "pydoc-" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def spec(self) -> DataSpec:
        """Chat; it reads nothing."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """Raise MissingDataError if this Python was installed without its topics."""
        if len(self.topics) < 10:
            raise BadDataError("pydoc_data holds fewer than ten topics")

    @cached_property
    def _train_text(self) -> str:
        return "\n\n".join(text for name, text in self.topics.items() if split_of(name) == "train")

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Sample k: a window of text, or a chat whose question is in the training split."""
        rng = stream.rng(k)
        if part == "text":
            text = self._train_text
            start = int(rng.integers(0, len(text) - self.window))
            return {"id": f"text-{start}", "text": text[start : start + self.window]}
        self._known(part)
        return next(e for e in _chats(rng) if split_of(_question(e)) == "train")

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """Whole topics, or different chats, of ``val`` or ``test``."""
        if split not in ("val", "test"):
            raise ConfigError(f"tiny_talk holds out val and test, not {split!r}")
        if part == "text":
            return [{"id": name, "text": text} for name, text in self.topics.items() if split_of(name) == split]
        self._known(part)
        found: dict[str, Example] = {}
        for example in _chats(np.random.default_rng(0)):
            if split_of(_question(example)) == split:
                found.setdefault(_question(example), example)
                if len(found) == self.held_out_chats:
                    break
        return list(found.values())

    def _known(self, part: str | None) -> None:
        if part not in (None, "chat"):
            raise ConfigError(f"tiny_talk has the parts text and chat, not {part!r}")


def _question(example: Example) -> str:
    return example["messages"][-1]["content"][0]["value"]


def _chats(rng: np.random.Generator):
    """An endless stream of small tasks."""
    while True:
        word = WORDS[int(rng.integers(len(WORDS)))]
        other = WORDS[int(rng.integers(len(WORDS)))]
        question, answer = (
            (f"say {word} {other}", f"{word} {other}"),
            (f"upper {word} {other}", f"{word} {other}".upper()),
            (f"first letter of {word} {other}", f"{word[0]} {other[0]}"),
            (f"swap {word} {other}", f"{other} {word}"),
        )[int(rng.integers(4))]
        yield Example(
            id=f"chat-{hashlib.sha256(question.encode()).hexdigest()[:10]}",
            messages=[text_message("user", question)],
            answer=answer,
            verifier="exact_text",
        )
