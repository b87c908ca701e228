"""What a folder of cases took from files that may change under a run: kept by the run, and taken over from it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.planning.plan import Plan
from bestiary.shared.data.planning.remarks import differs_from_plan
from bestiary.shared.data.volumes import VolumeSource

SAMPLE = 65_536
"""Bytes from the middle of a file that tell it from others of its length."""
PREPARING = ("plan", "configuration", "spacing", "intensity", "hu_window")
"""Options that say how an image is prepared, which is the model's to say where one is scored."""
CHOOSING = ("split", "fold", "folds", "split_seed")
"""Options that say which cases are trained on."""


class RecordedFolder(VolumeSource):
    """A source whose plan and lists of cases come from files.

    A subclass gives ``images_of``, ``splits`` and :meth:`own_normalization`.
    """

    splits: dict[str, list[str]]
    plan: Plan | None = None
    _adopted: tuple[pre.Normalization, ...] | None = None

    def images_of(self, case_id: str) -> list[Path]:
        """The files of a case's channels."""
        raise NotImplementedError

    def own_normalization(self) -> tuple[pre.Normalization, ...]:
        """The normalisation that plan and training cases call for."""
        raise NotImplementedError

    def normalization(self) -> tuple[pre.Normalization, ...]:
        """See :class:`VolumeSource`; what was adopted comes first."""
        return self.own_normalization() if self._adopted is None else self._adopted

    def state(self) -> dict[str, Any]:
        """See :class:`~bestiary.shared.core.protocols.DataSource`.

        Returns:
            ``options`` that stand for the plan, ``normalization`` of each channel, ``axes``, ``spacing``, and
            ``cases`` by part: of each id, a hash of its first image's length and of some of its bytes.
        """
        return {
            "options": {
                "plan": None,
                "configuration": None,
                "patch_size": list(self.patch_size),
                "strides": [list(level) for level in self.strides],
                "kernel_sizes": [list(level) for level in self.kernel_sizes],
            },
            "normalization": [dict(scheme) for scheme in self.normalization()],
            "axes": self.axes(),
            "spacing": list(self.spacing),
            "cases": {part: {case: self._print(case) for case in cases} for part, cases in self.splits.items()},
        }

    def adopt(self, state: Mapping[str, Any], changed: Collection[str] = ()) -> None:
        """See :class:`~bestiary.shared.core.protocols.DataSource`.

        The lists of cases are taken over unless another split was asked for; in another folder, only where it holds
        the very files of them.

        Raises:
            ConfigError: if what was changed is how images are prepared.
        """
        if wrong := sorted(set(changed) & set(PREPARING)):
            raise ConfigError(f"dataset.{wrong[0]}: scored images are prepared as those trained on were; leave it out")
        if len(state["spacing"]) != len(self.patch_size):
            return  # it does not fit, which is said where the specs are compared
        self._adopted = tuple(pre.check_normalization(scheme) for scheme in state["normalization"])
        self.spacing = tuple(float(size) for size in state["spacing"])
        if state["axes"] is not None:
            self.__dict__["_axes"] = state["axes"]
        cases = state.get("cases")
        if cases is None or set(changed) & set(CHOOSING):
            return
        if "root" not in changed or all(self._print(c) == p for part in cases.values() for c, p in part.items()):
            self.__dict__["splits"] = {part: list(found) for part, found in cases.items()}

    def remarks(self, config: Mapping[str, Any]) -> list[str]:
        """See :class:`~bestiary.shared.core.protocols.DataSource`: where the run is not as its plan."""
        return [] if self.plan is None else differs_from_plan(self.plan, config)

    def seen(self, state: Mapping[str, Any], split: str) -> list[str]:
        """See :class:`~bestiary.shared.core.protocols.DataSource`: cases of the same name and the same file."""
        trained = state.get("cases", {}).get("train", {})
        return [case for case in self.case_ids(split) if case in trained and trained[case] == self._print(case)]

    def _print(self, case_id: str) -> str:
        """What tells a case's first image from another of that name; ``missing`` where it is not there."""
        try:
            path = self.images_of(case_id)[0]
            with open(path, "rb") as handle:
                size = path.stat().st_size
                handle.seek(max(size - SAMPLE, 0) // 2)
                return hashlib.sha256(str(size).encode() + handle.read(SAMPLE)).hexdigest()[:16]
        except (OSError, KeyError):
            return "missing"
