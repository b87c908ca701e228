"""Tokenizers by name: bytes, symbols, words, SmolLM2's, Mistral's, or those of a checkpoint folder of transformers."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.core.examples import Message
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.language.chat_templates import TEMPLATES, Segment, chatml
from bestiary.shared.language.jinja_chat import JinjaChat
from bestiary.shared.language.media_marks import ANY_MARK, MARKS, MediaTokens
from bestiary.shared.language.symbol_tokenizer import SymbolTokenizer
from bestiary.shared.language.word_tokenizer import WordTokenizer, word_list

NAMES = ("byte", "symbols:…", "words:…", "smollm2", "mistral")


def load_tokenizer(name: str, template: str | None = None) -> Any:
    """A tokenizer (:class:`bestiary.shared.core.protocols.Tokenizer`).

    Args:
        name: ``byte``, ``smollm2``, ``mistral``, ``symbols:`` and the characters that are its tokens
            (``symbols:0123456789+=``), ``words:`` and a list of words (``words:music``), or a folder with tokenizer
            files of transformers.
        template: a name of :data:`~bestiary.shared.language.chat_templates.TEMPLATES`, in place of the tokenizer's own
            chat template. None: its own, or ChatML where it has none.

    Raises:
        ConfigError: for an unknown name or template, or symbols that do not fit.
        MissingDataError: if the asset is not on this machine.
        BadDataError: for files that cannot be used.
    """
    if template is not None and template not in TEMPLATES:
        raise ConfigError(
            f"there is no chat template {template!r}{nearest(template, TEMPLATES)}; {', '.join(TEMPLATES)}"
        )
    if name == "byte":
        return ByteTokenizer()
    if name.startswith("symbols:"):
        return SymbolTokenizer(name.removeprefix("symbols:"))
    if name.startswith("words:"):
        return WordTokenizer(word_list(name.removeprefix("words:")), name)
    if name == "smollm2":
        from bestiary.shared.hub.smollm2 import converted

        return FolderTokenizer(converted(), "smollm2", template)
    if name == "mistral":
        from bestiary.shared.data.assets import asset_path

        return SentencePieceTokenizer(asset_path("mistral_common") / "tokenizer.model.v1", "mistral", template)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return FolderTokenizer(folder, folder.name, template)
    raise ConfigError(
        f"the tokenizer {name!r} is not known{nearest(name, NAMES)}; there is: {', '.join(NAMES)}, or a folder with "
        "tokenizer files of transformers"
    )


TAGS = frozenset(
    f"<{end}{name}>"
    for name in ("think", "tool_call", "TOOLCALL", "tool_response", "TOOL_RESPONSE")
    for end in ("", "/")
)
"""What means something in an answer, though some checkpoints mark it as special: thoughts and calls of tools."""


class FolderTokenizer(MediaTokens):
    """The tokenizer of a checkpoint folder, with its own chat template where it has one.

    Args:
        folder: with tokenizer.json and the like.
        name: begins the key.
        template: a name of ``TEMPLATES`` to use in place of the folder's own chat template.

    Attributes:
        pad_id, eos_id, stop_ids, vocab_size, key: as in the protocol Tokenizer.

    Raises:
        BadDataError: if transformers cannot read the files.
    """

    def __init__(self, folder: Path, name: str, template: str | None = None):
        transformers = require("transformers", "zoo")
        try:
            self.hf: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers and tokenizers have many kinds of complaint about files
            reason = " ".join(str(error).split())[:300]
            raise BadDataError(f"{folder} has no tokenizer that transformers can read: {reason}") from error
        if not self.hf.is_fast:
            raise BadDataError(f"{folder}: its tokenizer gives no character offsets (a tokenizer.json is needed)")
        if self.hf.eos_token_id is None:
            raise BadDataError(f"{folder}: its tokenizer has no end token (eos_token in tokenizer_config.json)")
        self.eos_id: int = self.hf.eos_token_id
        self.pad_id: int = self.eos_id if self.hf.pad_token_id is None else self.hf.pad_token_id
        self.key = f"{name}-{_digest(folder)}"
        self._read_specials()
        self._template = TEMPLATES[template] if template else JinjaChat(self.hf) if self.hf.chat_template else chatml
        self.stop_ids = self._stop_ids(folder)

    @property
    def vocab_size(self) -> int:
        """All tokens, added ones included."""
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are never read from it, and none is added."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens but those of :data:`TAGS` are left out, broken UTF-8 is replaced."""
        # An embedding may be padded to more rows than there are tokens: such an id has no text.
        known = [i for i in ids if i < len(self.hf) and i not in self._silent]
        return self.hf.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens (known ones keep their id) and return their ids."""
        new = [name for name in names if self.token_id(name) is None]
        self.hf.add_tokens(new, special_tokens=True)
        self._read_specials()
        return [self.hf.convert_tokens_to_ids(name) for name in names]

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name, if there is one."""
        return self.hf.get_vocab().get(name)

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a chat, and which of them the assistant wrote (its end token included).

        Args:
            messages: text turns.
            add_generation_prompt: end with the assistant's header.
            thinking: whether the model should think; None is the template's default. A template without a switch
                ignores it.

        Raises:
            BadDataError: for an unknown role, content other than text, or turns that the template refuses.
        """
        return self._encode(self._name_marks(self._template(messages, add_generation_prompt, thinking)))

    def _name_marks(self, segments: Sequence[Segment]) -> list[Segment]:
        """Segments with marks of media cut out and put in as the template's own special tokens."""
        out: list[Segment] = []
        for segment in segments:
            for piece in ANY_MARK.split(segment.text):
                if piece in MARKS.values():
                    out.append(Segment(self.media_name(piece), segment.own))
                elif piece:
                    out.append(segment._replace(text=piece))
        return out

    def _encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Encode a chat in one piece, as the model saw it in training.

        A turn that spells a special token is encoded apart, so that nobody ends a turn by writing how turns end.
        """
        ids: list[int] = []
        own: list[bool] = []
        for group, plain in _groups(segments, self._specials):
            text = "".join(s.text for s in group)
            out = self.hf(text, add_special_tokens=False, split_special_tokens=plain, return_offsets_mapping=True)
            mine = [s.own for s in group for _ in s.text]
            ids += out["input_ids"]
            own += [mine[min(start, len(mine) - 1)] for start, _ in out["offset_mapping"]]
        return ids, own

    def _read_specials(self) -> None:
        specials = {i: token.content for i, token in self.hf.added_tokens_decoder.items() if token.special}
        self._specials = list(specials.values())
        self._silent = {i for i, name in specials.items() if name not in TAGS}

    def _stop_ids(self, folder: Path) -> tuple[int, ...]:
        """The end token, what generation_config.json names, and what ends an assistant's turn in the template."""
        found = [self.eos_id]
        file = folder / "generation_config.json"
        if file.is_file():
            try:
                named = json.loads(file.read_text()).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise BadDataError(f"{file} cannot be read: {error}") from error
            found += named if isinstance(named, list) else [] if named is None else [named]
        turn = [_text("user", "a"), _text("assistant", "b")]
        try:
            ids, own = self.chat(turn)
        except BadDataError:  # a template may want other turns; then the files must name the end token
            ids, own = [], []
        found += [i for i, mine in zip(ids, own, strict=True) if mine and i in self.hf.get_added_vocab().values()]
        return tuple(dict.fromkeys(found))


class SentencePieceTokenizer(MediaTokens):
    """A SentencePiece model; its chat format is made of added tokens.

    Each piece of a chat is encoded by itself, and so begins with SentencePiece's space mark.

    Args:
        file: the model file.
        name: begins the key.
        template: a name of ``TEMPLATES``; None is ChatML.

    Attributes:
        pad_id, eos_id, stop_ids, vocab_size, key: as in the protocol Tokenizer.

    Raises:
        BadDataError: if the file cannot be read.
    """

    def __init__(self, file: Path, name: str, template: str | None = None):
        sentencepiece = require("sentencepiece", "text")
        try:
            self.sp: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise BadDataError(f"{file} is no SentencePiece model: {error}") from error
        self.eos_id: int = self.sp.eos_id()
        self.pad_id: int = self.sp.pad_id() if self.sp.pad_id() >= 0 else self.eos_id
        self.key = f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
        self._template = TEMPLATES[template or "chatml"]
        self._specials: dict[str, int] = {}
        ends = {"chatml": "<|im_end|>"}.get(template or "chatml", "<SPECIAL_12>")
        starts = ["<|im_start|>"] if ends == "<|im_end|>" else ["<SPECIAL_10>", "<SPECIAL_11>"]
        self.stop_ids = (self.eos_id, self.add_tokens([*starts, ends])[-1])

    @property
    def vocab_size(self) -> int:
        """All tokens, added ones included."""
        return self.sp.vocab_size() + len(self._specials)

    @property
    def added_tokens(self) -> list[str]:
        """Names of the tokens above SentencePiece's own, in order."""
        return list(self._specials)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are never read from it, and none is added."""
        return self.sp.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens are left out, broken UTF-8 is replaced."""
        return self.sp.decode([i for i in ids if i < self.sp.vocab_size() and not self.sp.is_control(i)])

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens (known ones keep their id) and return their ids."""
        for name in names:
            self._specials.setdefault(name, self.vocab_size)
        return [self._specials[name] for name in names]

    def token_id(self, name: str) -> int | None:
        """The id of an added token by its name, if there is one."""
        return self._specials.get(name)

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a chat, and which of them the assistant wrote; arguments as in :class:`FolderTokenizer`."""
        ids: list[int] = []
        own: list[bool] = []
        for segment in self._template(messages, add_generation_prompt, thinking):
            encode = self._control if segment.control else self.encode
            new = self.encode_marked(segment.text, encode)
            ids += new
            own += [segment.own] * len(new)
        return ids, own

    def _control(self, text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, self._specials))})", text)
        pieces = [[self._specials[p]] if p in self._specials else self.encode(p) for p in parts if p]
        return [i for piece in pieces for i in piece]


def _groups(segments: Sequence[Segment], specials: Sequence[str]) -> Iterator[tuple[list[Segment], bool]]:
    """Runs of segments to encode together; (run, whether special tokens are to be read as plain text)."""
    run: list[Segment] = []
    for segment in segments:
        if not segment.control and any(name in segment.text for name in specials):
            if run:
                yield run, False
            yield [segment], True
            run = []
        elif segment.text:
            run.append(segment)
    if run:
        yield run, False


def _text(role: Any, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "value": text}]}


FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


@functools.lru_cache(maxsize=16)
def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({f for pattern in FILES for f in folder.glob(pattern) if f.is_file()}):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]
