"""hf_parquet: prompts from parquet files on this machine, such as a data set of Hugging Face that was downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, require
from bestiary.shared.data.user_files import regular_file
from bestiary.shared.rl.tasks.rows import KEYS, PromptRows

SCHEMAS: dict[str, dict[str, Any]] = {
    "gsm8k": {"prompt": "question", "answer": "answer", "answer_after": "####", "verifier": "numeric"},
}
"""Columns of known data sets."""
FIELD = re.compile(r"\{([^{}]*)\}")


class HFParquet(PromptRows):
    """Prompts from the rows of parquet files.

    ``schema`` says which column is what. A value is the name of a column (``reward_model.ground_truth`` reaches into a
    struct), or a template with columns in braces (``"{context} {question}"``). A column of prompts may hold text or a
    list of ``{role, content}``. ``meta`` is a map from names to columns. What a schema does not name is left out; rows
    are split by the hash of what is asked unless it maps ``split``.

    Args:
        path: a parquet file, or a folder of them, at any depth.
        schema: ``{prompt: column, answer: column, id: column, …, meta: {name: column}}``, or a name of
            :data:`SCHEMAS`. ``answer_after`` takes of an answer what follows the last such mark (``"####"``).
        verifier: of all rows whose schema maps none.
        max_mb: largest size of the files together; all rows are kept in memory.

    Raises:
        ConfigError: for an unknown schema, key or verifier.
    """

    def __init__(
        self,
        path: str | Path,
        schema: str | Mapping[str, Any],
        verifier: str | None = None,
        max_mb: float = 1000,
    ):
        if isinstance(schema, str):
            if schema not in SCHEMAS:
                there = ", ".join(SCHEMAS)
                raise ConfigError(
                    f"dataset.schema: there is no schema {schema!r}{nearest(schema, SCHEMAS)}; there is: {there}, or a "
                    "map {prompt: column, answer: column}"
                )
            schema = SCHEMAS[schema]
            verifier = verifier or schema.get("verifier")
            schema = {key: value for key, value in schema.items() if key != "verifier"}
        super().__init__("hf_parquet", path, verifier, max_mb)
        values = dict(schema)
        self.answer_after = values.pop("answer_after", None)
        for key, value in values.items():
            if key not in KEYS:
                raise ConfigError(f"dataset.schema: unknown key {key!r}{nearest(str(key), KEYS)}; {', '.join(KEYS)}")
            if not (isinstance(value, Mapping) if key == "meta" else isinstance(value, str)):
                raise ConfigError(f"dataset.schema.{key} names a column (meta: a map of them), not {value!r}")
        if "prompt" not in values and "messages" not in values:
            raise ConfigError("dataset.schema says nothing of the prompt: give prompt: COLUMN")
        self.meta: dict[str, str] = {str(k): str(v) for k, v in values.pop("meta", {}).items()}
        self.schema: dict[str, str] = values

    def files(self) -> list[Path]:
        """The files, in the order of their names."""
        if not self.path.is_dir():
            return [regular_file(self.path, "dataset.path", "a parquet file or a folder of them")]
        found = sorted(self.path.rglob("*.parquet"))
        if not found:
            raise MissingDataError(
                f"{self.path}: no *.parquet file is in this folder. Set dataset.path to one that has"
            )
        return found

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each row, as ``FILE row N``."""
        parquet = require("pyarrow.parquet", "rl")
        wanted = [*self.schema.values(), *self.meta.values()]
        columns = sorted({name.split(".")[0] for value in wanted for name in _columns(value)})
        for file in self.files():
            try:
                handle = parquet.ParquetFile(file)
                there = handle.schema_arrow.names
            except Exception as error:  # pyarrow has many kinds of complaint about files
                raise BadDataError(f"{file} is no parquet file that can be read: {error}") from error
            for name in columns:
                if name not in there:
                    hint = nearest(name, there)
                    raise ConfigError(f"dataset.schema: {file} has no column {name!r}{hint}; it has {', '.join(there)}")
            number = 0
            try:
                for batch in handle.iter_batches(columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file.name} row {number}", self._row(row)
            except (OSError, ValueError) as error:  # pyarrow's own are both
                raise BadDataError(f"{file} cannot be read after row {number}: {error}") from error

    def _row(self, row: Mapping[str, Any]) -> Any:
        try:
            out: dict[str, Any] = {key: _value(row, value) for key, value in self.schema.items()}
            if self.meta:
                out["meta"] = {name: _value(row, value) for name, value in self.meta.items()}
            if self.answer_after is not None and isinstance(out.get("answer"), str):
                _, mark, after = out["answer"].rpartition(self.answer_after)
                if not mark:
                    raise ValueError(f"its answer has no {self.answer_after!r}")
                out["answer"] = after.strip()
        except ValueError as error:
            return error
        return out


def _columns(value: str) -> list[str]:
    return FIELD.findall(value) or [value]


def _value(row: Mapping[str, Any], value: str) -> Any:
    """A column's value, or a template filled in."""
    if not FIELD.search(value):
        return _reach(row, value)
    return FIELD.sub(lambda match: str(_reach(row, match[1], needed=True)), value)


def _reach(row: Mapping[str, Any], name: str, needed: bool = False) -> Any:
    found: Any = row
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if found is None and needed:
        raise ValueError(f"its column {name!r} is empty")
    return found
