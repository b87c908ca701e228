"""Structured output: does the JSON that was written fit the schema that was asked for."""

from __future__ import annotations

import json
from typing import Any

from bestiary.shared.core.errors import BadDataError, require
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think, last_fence
from bestiary.shared.rl.rewards.workers import WorkerPool


class JsonSchema:
    """1 if the JSON behind the thoughts is valid against ``meta["schema"]``; what it says is not judged.

    The last closed fence (``json`` or without a language) is read, or the whole answer where there is none. Keys that
    come twice, NaN, infinities and nesting beyond 64 levels are no JSON here. All of it happens in a worker process:
    a regular expression of the schema may be catastrophic on an answer. Too slow is 0 with status ``timeout``.

    Paper: arXiv:2512.20848 (Nemotron 3 Nano): the structured-output environment.

    Args:
        workers: worker processes.
        deadline_s: seconds for one answer.
        max_chars: longest JSON text; a longer one scores 0.
    """

    name = "json_schema"
    version = "1"

    def __init__(self, workers: int = 2, deadline_s: float = 10.0, max_chars: int = 200_000):
        require("jsonschema", "rl")
        self.max_chars = max_chars
        self.pool = WorkerPool("bestiary.shared.rl.rewards.json_child:judge", workers, deadline_s)

    def check(self, example: Example) -> None:
        """Raise BadDataError where there is no schema, or it is none."""
        schema = self._schema(example)
        where = f"example {example.get('id')!r}"
        if schema is None:
            raise BadDataError(f'{where} has no meta["schema"] (a JSON schema)')
        result = self.pool.call(None, schema)
        if result.status != "ok" or result.value[0] == "bad schema":
            note = result.value[1] if result.status == "ok" else result.note
            raise BadDataError(f'{where}: its meta["schema"] cannot be used: {note}')

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Parse and validate."""
        text = after_think(answer)
        fenced = last_fence(text, ("json",))
        text = text if fenced is None else fenced
        if len(text) > self.max_chars:
            return Verdict(0.0, note=f"longer than {self.max_chars} characters")
        result = self.pool.call(text, self._schema(example))
        if result.status == "error":
            return Verdict(0.0, "error", note=result.note)
        if result.status != "ok":
            return Verdict(0.0, "timeout", note=result.note)
        verdict, note = result.value
        if verdict == "bad schema":
            return Verdict(0.0, "error", note=f"bad schema: {note}")
        return Verdict(float(verdict == "valid"), note=note)

    def gold_answer(self, example: Example) -> str | None:
        """The answer, as it stands or as JSON."""
        answer: Any = example.get("answer")
        return answer if answer is None or isinstance(answer, str) else json.dumps(answer)

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()

    def _schema(self, example: Example) -> Any:
        schema = (example.get("meta") or {}).get("schema")
        if isinstance(schema, str):
            try:
                return json.loads(schema)
            except ValueError:
                return None
        return schema
