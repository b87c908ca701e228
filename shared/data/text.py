"""Text corpora: folders of text files, held out by file, trained on as windows of a packed token stream."""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import Example, check_example
from bestiary.shared.core.loader import Blend
from bestiary.shared.core.protocols import Tokenizer
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.assets import asset_path
from bestiary.shared.data.splits import SPLITS, split_of
from bestiary.shared.data.token_files import Packing, Round, token_file
from bestiary.shared.data.volumes import LazyExamples

SKIPPED_SHARE = 0.1
"""Share of a folder's files that may be unreadable; more says that it is not what it was taken for."""


@dataclass(frozen=True)
class Document:
    """Where one document stands.

    Attributes:
        name: unique in its corpus; its hash decides the split.
        file: the file. part: its number among the file's documents.
        split: ``train``, ``val`` or ``test``.
    """

    name: str
    file: Path
    part: int
    split: str


class TextFolder:
    """Text files below a folder, as documents to pretrain a language model on.

    A document is a file, or a piece of one where ``split_on`` is given. A tenth of the documents each is held out for
    ``val`` and ``test`` by the hash of its name; of documents with the same text, only the first is taken. Training
    samples are windows of the packed stream of :class:`~bestiary.shared.data.token_files.Packing`: the documents are
    reshuffled each round, and the windows of a round are visited in another random order, since neighbours in the
    stream come from one document and would make an uneven batch.

    Args:
        tokenizer: name of the backbone's tokenizer (``byte``, ``smollm2``, a folder …), or None for that of
        checkpoint: the folder of the backbone's checkpoint, or None.
        root: the folder; or
        asset: the asset of ``conf/assets.yaml`` whose folder it is.
        name: of the corpus, in ids and messages.
        files: globs on the names of wanted files, at any depth; ``.gz`` files are unpacked.
        exclude: globs on the names of files and folders that are left out, at any depth.
        split_on: regular expression (multi-line) at whose matches a file is cut into documents; None: at none.
        window: tokens of a training sample.
        reset: a sample tells its documents apart, so that the model reads each alone; false: plain concatenation.
        held_out_documents: at most so many of each held-out split, the first by the hash of their names; None: all.
        held_out_chars: at most so many characters of each, from its beginning; None: all.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        checkpoint: str | None = None,
        root: str | Path | None = None,
        asset: str | None = None,
        name: str = "text_folder",
        files: Sequence[str] = ("*.txt", "*.md", "*.py", "*.rst"),
        exclude: Sequence[str] = (".*", "__pycache__"),
        split_on: str | None = None,
        window: int = 1024,
        reset: bool = True,
        held_out_documents: int | None = 64,
        held_out_chars: int | None = None,
    ):
        self.tokenizer = tokenizer or checkpoint
        self.root, self.asset, self.name = root, asset, name
        self.files, self.exclude = tuple(files), tuple(exclude)
        self.window, self.reset = window, reset
        self.held_out_documents, self.held_out_chars = held_out_documents, held_out_chars
        try:
            self.cut = re.compile(split_on, re.MULTILINE) if split_on else None
        except re.error as error:
            raise ConfigError(f"dataset.split_on is no regular expression: {error}") from error
        if self.cut is not None and self.cut.groups:
            raise ConfigError("dataset.split_on may not capture a group: write (?:…) for (…)")
        self.skipped: dict[str, str] = {}
        self._rounds: dict[tuple[int, str, int], Round] = {}
        self._last: tuple[Path, list[str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker opens the memory-mapped file itself; a tokenizer may not be picklable.
        return {k: v for k, v in self.__dict__.items() if k not in ("packing", "encoder")} | {
            "_rounds": {},
            "_last": None,
        }

    # -------------------------------------------------------------- the files

    def folder(self) -> Path:
        """The folder of the files.

        Raises:
            MissingDataError: if it is not there. ConfigError: if none is named.
        """
        if self.asset is not None:
            return asset_path(self.asset)
        if self.root is None:
            raise ConfigError(f"{self.name}: which folder? give dataset.root=…")
        folder = Path(self.root).expanduser()
        if not folder.is_dir():
            raise MissingDataError(f"{folder}: there is no such folder. Set dataset.root to a folder of text files.")
        return folder

    def _paths(self) -> Iterator[Path]:
        """The wanted files in a fixed order."""

        def wanted(name: str) -> bool:
            return not any(fnmatchcase(name, pattern) for pattern in self.exclude)

        def failed(error: OSError) -> None:
            self.skipped[str(error.filename)] = error.strerror or "cannot be read"

        for parent, folders, names in os.walk(self.folder(), onerror=failed):
            folders[:] = sorted(filter(wanted, folders))
            for name in sorted(filter(wanted, names)):
                if any(fnmatchcase(name, pattern) for pattern in self.files):
                    yield Path(parent) / name

    def _pieces(self, path: Path) -> list[str]:
        """A file's documents, the empty ones left out."""
        text = read_text(path)
        pieces = self.cut.split(text) if self.cut else [text]
        return [piece for piece in pieces if piece and piece.strip()]

    @cached_property
    def _index(self) -> tuple[list[Document], str]:
        """All documents, and the hash of their names and texts; says once which files are left out."""
        root, total, documents = self.folder(), 0, []
        names: set[str] = set()
        texts: set[bytes] = set()
        revision = hashlib.sha256()
        for path in self._paths():
            total += 1
            # A name that is not UTF-8 is named by its escapes.
            inside = (
                path.relative_to(root).as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")
            )
            try:
                pieces = self._pieces(path)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                self.skipped[inside] = str(error).splitlines()[0]
                continue
            for part, piece in enumerate(pieces):
                digest = hashlib.sha256(piece.encode()).digest()
                if digest in texts:
                    continue
                texts.add(digest)
                # A piece is named by its first line: pieces that are added or dropped move no other to another split.
                name = f"{inside}#{piece.strip().splitlines()[0].strip()[:80]}" if self.cut else inside
                while name in names:
                    name += "'"
                names.add(name)
                documents.append(Document(name, path, part, split_of(name)))
                revision.update(f"{name}\0{documents[-1].split}\0".encode() + digest)
        if len(self.skipped) > max(1, SKIPPED_SHARE * total):
            raise BadDataError(f"{root}: {self._skipped_report()}. Is this the folder of texts, and are `files` right?")
        if self.skipped:
            print(f"{self.name}: left out: {self._skipped_report()}", flush=True)
        return documents, revision.hexdigest()[:12]

    def _skipped_report(self) -> str:
        shown = "; ".join(f"{name} ({why})" for name, why in list(self.skipped.items())[:5])
        more = f"; and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
        return f"{len(self.skipped)} files cannot be read as UTF-8 text: {shown}{more}"

    def documents(self, split: str) -> list[Document]:
        """The documents of ``train``, ``val`` or ``test``, in a fixed order."""
        if split not in SPLITS:
            raise ConfigError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
        return [document for document in self._index[0] if document.split == split]

    def text(self, document: Document) -> str:
        """The text of a document."""
        if self._last is None or self._last[0] != document.file:  # those of one file are asked for one after another
            self._last = (document.file, self._pieces(document.file))
        return self._last[1][document.part]

    # -------------------------------------------------------------- the DataSource

    @property
    def revision(self) -> str:
        """Name, and hash of all documents."""
        return f"{self.name}-{self._index[1]}"

    def spec(self) -> DataSpec:
        """Text; it reads nothing."""
        return DataSpec(task="text")

    def check(self) -> None:
        """Look at every file; name in one line those that are left out because they cannot be read.

        Raises:
            ConfigError: if there is no tokenizer. MissingDataError: if the folder or asset is not there.
            BadDataError: if many files cannot be read, or there is nothing to train on or to hold out.
        """
        self.encoder  # noqa: B018 - raises where there is none
        counts = {split: len(self.documents(split)) for split in SPLITS}
        if not counts["train"] or not counts["val"] + counts["test"]:
            found = ", ".join(f"{n} {split}" for split, n in counts.items())
            raise BadDataError(
                f"{self.folder()}: the files {', '.join(self.files)} make too few documents ({found}). Add files, or "
                "cut long ones: dataset.split_on='^# ' begins a document at every such line"
            )

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ConfigError: if none is named.
        """
        if not self.tokenizer:
            raise ConfigError(
                f"the data set {self.name} is read in the tokens of the backbone, and the chosen one names no "
                "tokenizer: choose a language model (backbone=llama_tiny), or name its (dataset.tokenizer=byte)"
            )
        from bestiary.shared.language.tokenizers import load_tokenizer

        return load_tokenizer(self.tokenizer)

    @cached_property
    def packing(self) -> Packing:
        """The training documents as a stream of tokens."""
        texts = (self.text(document) for document in self.documents("train"))
        return Packing(token_file(self.revision, self.encoder, texts), self.encoder.eos_id, self.window)

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Window k of a stream: a pure function of (seed, stage, k), the texts and the options.

        Returns:
            An Example with ``tokens`` (window,) int64, and with ``reset`` ``documents`` (window,) int32.
        """
        self._no_parts(part)
        count, index = k // self.packing.windows, stream.shuffled(k, self.packing.windows)
        tokens, documents = self.packing.read(index, self._round(stream, count))
        example: Example = {
            "id": f"{self.name}/{count}/{index}",
            "meta": {"tokenizer": self.encoder.key},
            "tokens": tokens,
        }
        if self.reset:
            example["documents"] = documents
        return check_example(example)

    def _round(self, stream: Stream, count: int) -> Round:
        key = (stream.seed, stream.stage, count)
        if key not in self._rounds:
            if len(self._rounds) > 8:
                self._rounds.clear()
            order = stream.rng(count, "documents").permutation(len(self.packing.lengths))
            self._rounds[key] = self.packing.round(order)
        return self._rounds[key]

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The first documents of a split by the hash of their names, read one by one as they are asked for."""
        self._no_parts(part)
        chosen = sorted(self.documents(split), key=lambda d: hashlib.sha256(d.name.encode()).digest())
        named = {f"{self.name}/{d.name}": d for d in chosen[: self.held_out_documents]}

        def read(name: str) -> Example:
            return check_example({"id": name, "text": self.text(named[name])[: self.held_out_chars]})

        return LazyExamples(list(named), read)

    def _no_parts(self, part: str | None) -> None:
        if part is not None:
            raise ConfigError(f"the data set {self.name} has no parts; part={part!r} was asked for")


class StandardLibrary(TextFolder):
    """The Python files of the running interpreter's standard library; nothing has to be fetched."""

    def folder(self) -> Path:
        """Where the standard library stands.

        Raises:
            MissingDataError: if it is packed into a zip file.
        """
        folder = Path(sysconfig.get_path("stdlib"))
        if not folder.is_dir():
            raise MissingDataError(f"{folder}: this Python keeps no source files of its standard library")
        return folder

    @property
    def revision(self) -> str:
        """Name, version of Python, and hash of all documents."""
        return f"{self.name}-{platform.python_version()}-{self._index[1]}"


class TextMix:
    """Several corpora as one data set: the whole draws from each by its size, and each is a part by its name.

    A recipe's blend names the parts to draw from them in other proportions, which may change with its phases.

    Args:
        corpora: name to corpus.
    """

    def __init__(self, corpora: Mapping[str, TextFolder]):
        if not corpora:
            raise ConfigError("a text_mix needs at least one corpus")
        self.corpora = dict(corpora)

    @property
    def revision(self) -> str:
        """Those of all corpora."""
        return "+".join(corpus.revision for corpus in self.corpora.values())

    def spec(self) -> DataSpec:
        """Text; it reads nothing."""
        return DataSpec(task="text")

    def check(self) -> None:
        """Check every corpus."""
        for corpus in self.corpora.values():
            corpus.check()

    @cached_property
    def _by_size(self) -> Blend:
        entries: list[Any] = [(corpus, None, corpus.packing.windows) for corpus in self.corpora.values()]
        return Blend(entries)

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Window k of one corpus, or of the whole."""
        return (self._by_size if part is None else self._corpus(part)).train_example(k, stream)

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """Held-out documents of one corpus, or of all, one corpus after another."""
        if part is not None:
            return self._corpus(part).held_out(split)
        found = [corpus.held_out(split) for corpus in self.corpora.values()]
        places = {f"{i}/{j}": (i, j) for i, examples in enumerate(found) for j in range(len(examples))}

        def read(place: str) -> Example:
            corpus, index = places[place]
            return found[corpus][index]

        return LazyExamples(list(places), read)

    def _corpus(self, name: str) -> TextFolder:
        if name not in self.corpora:
            raise ConfigError(f"this text_mix has the parts {', '.join(self.corpora)}, not {name!r}")
        return self.corpora[name]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, unpacked if its name ends in ``.gz``, line ends as they are.

    Raises:
        ValueError: if it is not UTF-8, or binary (it has a NUL). OSError: if it cannot be read.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if b"\0" in data:
        raise ValueError("binary: it has a NUL byte")
    return data.decode("utf-8-sig")
