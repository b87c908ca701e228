"""Generated reasoning tasks: those of the package reasoning-gym, one or a mixture."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.loader import phase_weights
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream, derive_seed
from bestiary.shared.rl.rewards.reasoning_gym import NO_GOLD, UNUSABLE

SYSTEM = "Think as long as you need. Then give the final answer, and nothing else, between <answer> and </answer>."
TRIES = 50
"""How many items in a row may be ones that are held out, before a task counts as too small."""


class ReasoningGymTask:
    """Tasks of reasoning-gym as prompts, scored by the verifier ``reasoning_gym``.

    Training items, ``val`` and ``test`` come from seeds far apart (reasoning-gym numbers its items by seed + index, so
    neighbouring seeds share nearly all of them). No question of a held-out split is trained on, nor in the other one:
    a training item whose question is held out gives way to another, the same one each time. Nothing is generated
    before it is asked for, except the held-out items.

    In a mixture each sample's task is drawn by weight, and each task is a part by its name.

    Args:
        task: name of the task; or
        config: options of its generator, for example ``{min_terms: 3}`` for ``chain_sum``.
        tasks: a mixture instead: ``{chain_sum: {weight: 1, config: {…}}, …}``.
        seed: of the items.
        size: different training items of each task.
        held_out: items of each held-out split and task.
        system: what the system turn says; None for none. The verifier looks for <answer> tags, else at the last line.
        allow_no_gold: let in tasks that know no right answer beforehand, which the test at start-up cannot look at.
    """

    def __init__(
        self,
        task: str | None = None,
        config: Mapping[str, Any] | None = None,
        tasks: Mapping[str, Any] | None = None,
        seed: int = 0,
        size: int = 10_000,
        held_out: int = 64,
        system: str | None = SYSTEM,
        allow_no_gold: bool = False,
    ):
        if (task is None) == (tasks is None) or (tasks is not None and (config or not tasks)):
            raise ConfigError(
                "reasoning_gym needs one task (dataset.task=chain_sum, with dataset.config) or a mixture "
                "(dataset.tasks={chain_sum: {weight: 1, config: {}}})"
            )
        if size < 1 or held_out < 1:
            raise ConfigError(f"reasoning_gym: size={size} and held_out={held_out} must be 1 or more")
        entries = {task: {"config": config or {}}} if task is not None else dict(tasks or {})
        self.tasks: dict[str, dict[str, Any]] = {str(name): _entry(str(name), e) for name, e in entries.items()}
        weights = {name: entry["weight"] for name, entry in self.tasks.items()}
        self._edges = np.cumsum(phase_weights("reasoning_gym: tasks", weights, 1)[0])
        self.seed, self.size, self.held_out_count = seed, size, held_out
        self.system, self.allow_no_gold = system, allow_no_gold
        self._generators: dict[tuple[str, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_held"} | {"_generators": {}}

    @property
    def revision(self) -> str:
        """The package's version, and the hash of all that decides the items."""
        require("reasoning_gym", "rl")
        told = [self.tasks, self.seed, self.size, self.held_out_count, self.system]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return f"reasoning_gym-{version('reasoning-gym')}-{digest}"

    def spec(self) -> DataSpec:
        """Chat; it reads nothing."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """Make every generator, the held-out items, and one item to train on.

        Raises:
            MissingExtraError: if reasoning-gym is not installed.
            ConfigError: for an unknown task or option, or a task that cannot be used.
            BadDataError: for a task that is too small to hold something out.
        """
        for name, entry in self.tasks.items():
            self._check_task(name, entry["config"])
        for name in self.tasks:
            self._train_item(name, 0)

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Item k of a stream, all items of a task once before any comes again."""
        if part is not None:
            self._known(part)
            return self._example(part, self._train_item(part, stream.shuffled(k, self.size)))
        at = int(np.searchsorted(self._edges, stream.rng(k, "task").random() * self._edges[-1], side="right"))
        name = list(self.tasks)[at]
        own = Stream(stream.seed, f"{stream.stage}/{name}", stream.global_batch)
        return self._example(name, self._train_item(name, own.shuffled(k, self.size)))

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The items of ``val`` or ``test`` of one task, or of all, one task after another."""
        if split not in ("val", "test"):
            raise ConfigError(f"reasoning_gym holds out val and test, not {split!r}")
        if part is not None:
            self._known(part)
        names = list(self.tasks) if part is None else [part]
        return [self._example(name, item) for name in names for item in self._held[name][split]]

    # -------------------------------------------------------------- items

    @cached_property
    def _held(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Task to split to items. Questions differ within a split and between the two."""
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for name in self.tasks:
            seen: set[str] = set()
            found[name] = {}
            for split in ("test", "val"):
                items: list[dict[str, Any]] = []
                for index in range(self.held_out_count * 4):
                    item = self._item(name, split, index)
                    if item["question"] not in seen and _solved(item):
                        seen.add(item["question"])
                        items.append(item)
                    if len(items) == self.held_out_count:
                        break
                if not items:
                    raise BadDataError(
                        f"reasoning_gym: {name} with these options has too few different questions for val and test. "
                        "Give it a wider config, or another task"
                    )
                found[name][split] = items
        return found

    @cached_property
    def _held_questions(self) -> dict[str, set[str]]:
        return {n: {i["question"] for items in splits.values() for i in items} for n, splits in self._held.items()}

    def _train_item(self, name: str, index: int) -> dict[str, Any]:
        for turn in range(TRIES):
            item = self._item(name, "train", index + turn * self.size)
            if item["question"] not in self._held_questions[name] and _solved(item):
                return item
        raise BadDataError(
            f"reasoning_gym: {name} with these options has so few different questions that {TRIES} in a row are held "
            f"out. Give it a wider config, or a smaller dataset.held_out than {self.held_out_count}"
        )

    def _item(self, name: str, split: str, index: int) -> dict[str, Any]:
        """One item as plain JSON data: tuples become lists, here as in any file."""
        with contextlib.redirect_stdout(io.StringIO()):  # a generator prints its progress
            item = self._generator(name, split)[index]
        try:
            return json.loads(json.dumps(item))
        except (TypeError, ValueError) as error:
            raise BadDataError(f"reasoning_gym: an item of {name} is no JSON ({error})") from error

    def _generator(self, name: str, split: str) -> Any:
        if (name, split) not in self._generators:
            seed = derive_seed("reasoning_gym", name, split, self.seed) % 2**31
            self._generators[name, split] = self._make(name, seed, self.tasks[name]["config"])
        return self._generators[name, split]

    def _make(self, name: str, seed: int, config: Mapping[str, Any]) -> Any:
        gym = require("reasoning_gym", "rl")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                # An index beyond size is an item too; the largest one asked for counts here.
                return gym.create_dataset(name, seed=seed, size=self.size * TRIES, **config)
        except Exception as error:  # generators check their options with assertions, TypeError and ValueError
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(f"reasoning_gym: {name} refuses its config {dict(config)}: {why}") from error

    def _example(self, name: str, item: dict[str, Any]) -> Example:
        turns = [] if self.system is None else [text_message("system", self.system)]
        digest = hashlib.sha256(item["question"].encode()).hexdigest()[:16]
        example = Example(
            id=f"{name}-{digest}",
            messages=[*turns, text_message("user", item["question"])],
            verifier="reasoning_gym",
            meta={"task": name, "config": self.tasks[name]["config"], "entry": item},
        )
        if item["answer"] is not None:
            example["answer"] = item["answer"]
        return example

    # -------------------------------------------------------------- checks

    def _known(self, part: str) -> None:
        if part not in self.tasks:
            raise ConfigError(f"reasoning_gym has the parts {', '.join(self.tasks)} here, not {part!r}")

    def _check_task(self, name: str, config: Mapping[str, Any]) -> None:
        require("reasoning_gym", "rl")
        known = require("reasoning_gym.factory", "rl").DATASETS
        if name in UNUSABLE:
            raise ConfigError(f"reasoning_gym: the task {name} cannot be used: {UNUSABLE[name]}")
        if name not in known:
            raise ConfigError(
                f"reasoning_gym has no task {name!r}{nearest(name, known)}. There are: {', '.join(known)}"
            )
        if name in NO_GOLD and not self.allow_no_gold:
            raise ConfigError(
                f"reasoning_gym: the task {name} knows no right answer beforehand, so its scoring cannot be tested. "
                "Set dataset.allow_no_gold=true to use it all the same"
            )
        fields = [field.name for field in dataclasses.fields(known[name][1]) if field.name not in ("seed", "size")]
        for key in config:
            if key not in fields:
                raise ConfigError(
                    f"reasoning_gym: {name} has no option {key!r}{nearest(str(key), fields)}; it has "
                    f"{', '.join(fields)} (seed and size are the data set's own)"
                )


def _solved(item: Mapping[str, Any]) -> bool:
    """False where sympy left an integral undone and the generator took it for the answer (intermediate_integration)."""
    return "Integral(" not in str(item["answer"])


def _entry(name: str, entry: Any) -> dict[str, Any]:
    entry = {} if entry is None else entry
    if not isinstance(entry, Mapping) or set(entry) - {"weight", "config"}:
        raise ConfigError(f"reasoning_gym: tasks.{name} takes weight and config, like {{weight: 1}}; not {entry!r}")
    config = entry.get("config") or {}
    if not isinstance(config, Mapping):
        raise ConfigError(f"reasoning_gym: the config of {name} is a map of options, not {config!r}")
    return {"weight": entry.get("weight", 1), "config": dict(config)}
