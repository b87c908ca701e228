"""DataSpec: what a model must know of its data before any data is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from bestiary.shared.core.errors import ConfigError

Task = Literal["seg", "chat", "text"]


@dataclass(frozen=True)
class DataSpec:
    """What flows from a data set to a model. It comes from a config or a plan; no data is read for it.

    Attributes:
        task: ``seg`` (volumes or images with label maps), ``chat`` (messages) or ``text`` (plain text).
        modalities: names of the input channels (seg) or of the media in a chat, for example ``("T1",)``.
        spatial_dims: 2 or 3 for seg, 0 otherwise.
        in_channels: image channels for seg, 0 otherwise.
        num_classes: classes including background for seg, 0 otherwise.
        class_names: one name per class, background first.
        spacing: target voxel size in millimetres, one number per axis.
        patch_size: voxels of a training patch, one number per axis.
        strides: one tuple per level of the network, the first usually all ones; a number stands for all axes.
        kernel_sizes: one tuple or number per level, or empty for 3 everywhere.
    """

    task: Task
    modalities: tuple[str, ...] = ()
    spatial_dims: int = 0
    in_channels: int = 0
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    spacing: tuple[float, ...] = ()
    patch_size: tuple[int, ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()
    kernel_sizes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("modalities", "class_names", "spacing", "patch_size", "strides", "kernel_sizes"):
            if isinstance(getattr(self, name), int | float | str):
                raise ConfigError(f"DataSpec.{name} must be a list, not {getattr(self, name)!r}")
        for name in ("modalities", "class_names", "spacing", "patch_size"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        for name in ("strides", "kernel_sizes"):
            levels = getattr(self, name) or ()
            spread = ((v,) * self.spatial_dims if isinstance(v, int) else tuple(v) for v in levels)
            object.__setattr__(self, name, tuple(spread))
        self._check()

    def _check(self) -> None:
        if self.task not in ("seg", "chat", "text"):
            raise ConfigError(f"DataSpec.task must be seg, chat or text, not {self.task!r}")
        if self.task != "seg":
            return
        if self.spatial_dims not in (2, 3):
            raise ConfigError(f"DataSpec.spatial_dims must be 2 or 3, not {self.spatial_dims}")
        if len(self.class_names) != self.num_classes:
            raise ConfigError(
                f"DataSpec names {len(self.class_names)} classes but num_classes is {self.num_classes} "
                "(background counts)"
            )
        for name in ("spacing", "patch_size"):
            value = getattr(self, name)
            if len(value) != self.spatial_dims:
                raise ConfigError(f"DataSpec.{name} needs {self.spatial_dims} numbers, got {value}")
        for name in ("strides", "kernel_sizes"):
            if any(len(level) != self.spatial_dims for level in getattr(self, name)):
                raise ConfigError(f"every level of DataSpec.{name} needs {self.spatial_dims} numbers")
        if any(not 0 <= size < float("inf") for size in self.spacing):
            raise ConfigError(f"spacing {self.spacing} is in mm, 0 for each file's own")
        if any(n < 1 for level in (self.patch_size, *self.strides, *self.kernel_sizes) for n in level):
            raise ConfigError(
                f"patch_size {self.patch_size}, strides and kernel_sizes are numbers of voxels, 1 or more each"
            )
        total = [1] * self.spatial_dims
        for level in self.strides:
            total = [t * s for t, s in zip(total, level, strict=True)]
        if any(p % t for p, t in zip(self.patch_size, total, strict=True)):
            raise ConfigError(
                f"patch_size {self.patch_size} must be divisible by the product of the strides {tuple(total)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain lists and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: for an unknown field.
        """
        known = {f.name for f in fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ConfigError(f"unknown fields of DataSpec: {sorted(unknown)}")
        return cls(**values)
