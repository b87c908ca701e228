"""What a hybrid stack remembers: convolution and SSM states of Mamba layers, keys and values of attention layers.

Shape legend: B rows, T tokens, C convolution channels, W convolution width, H heads, P head width, N states,
K key-value heads, S cached tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.key_value_cache import rows_behind

STATE_DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""SSM states are kept in one of these; float16 is rounded stochastically."""

_FORMAT = "bestiary hybrid cache 1"


@dataclass
class MambaState:
    """What one Mamba-2 layer remembers.

    Attributes:
        conv: (B, W - 1, C) the last inputs of the convolution, in the activations' dtype, the newest at the end.
        ssm: (B, H, P, N) in float32, or float16 with stochastic rounding (float64 for float64 models).
        replay: with recording on, what makes the states after fewer tokens of the last chunk: (B,) counts to
            ``(conv, ssm)``.
    """

    conv: torch.Tensor
    ssm: torch.Tensor
    replay: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name."""
        return {"conv": self.conv, "ssm": self.ssm}


@dataclass
class KeyValues:
    """Keys and values of one attention layer, (B, K, capacity, P), of which the first ``length`` are there."""

    key: torch.Tensor
    value: torch.Tensor
    length: int = 0

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put in (B, K, T, P) each, and return all, (B, K, S, P)."""
        old, new = self.length, self.length + key.shape[2]
        if key.requires_grad or value.requires_grad:  # writing in place would cut the gradient of earlier reads
            self.key = torch.cat([self.key[:, :, :old], key], dim=2)
            self.value = torch.cat([self.value[:, :, :old], value], dim=2)
            self.length = new
            return self.key, self.value
        if new > self.key.shape[2]:
            # Growing by half costs a constant number of copies a token; a copy at each step would cost S.
            self.reserve(max(new, old + old // 2 + 16))
        self.length = new
        for room, added in ((self.key, key), (self.value, value)):
            room.narrow(2, old, new - old).copy_(added)  # in half the time of an assignment to a slice
        return self.key.narrow(2, 0, new), self.value.narrow(2, 0, new)

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens."""
        for name in ("key", "value"):
            old = getattr(self, name)
            room = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            room[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, room)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, without the room for more."""
        return {"key": self.key[:, :, : self.length], "value": self.value[:, :, : self.length]}


@dataclass
class HybridCache:
    """The cache of one model for B rows; MLP and MoE layers have None in ``layers``.

    With ``record`` on, :meth:`truncate` and :meth:`keep` can go back over the tokens of the last forward pass: the
    Mamba layers then keep that pass's inputs and the states before it.

    Attributes:
        layers: one entry a layer.
        length: tokens a row has had, padding included.
        record: whether to keep what going back needs.
        seed: of the stochastic rounding of float16 states.
    """

    layers: list[MambaState | KeyValues | None]
    length: int = 0
    record: bool = False
    seed: int = 0
    begun: int = field(default=0, repr=False)
    """``length`` before the last forward pass."""
    joinable: ClassVar[bool] = True

    @classmethod
    def empty(
        cls,
        config: HybridConfig,
        pattern: str,
        batch_size: int,
        like: torch.Tensor,
        state_dtype: torch.dtype = torch.float32,
    ) -> HybridCache:
        """A cache without tokens.

        Args:
            config: the model's. pattern: its layers.
            batch_size: B.
            like: gives device and dtype of the activations.
            state_dtype: of the SSM states; float64 models have float64 states.
        """
        kind = {"device": like.device, "dtype": like.dtype}
        state = torch.float64 if like.dtype == torch.float64 else state_dtype
        layers: list[MambaState | KeyValues | None] = []
        for letter in pattern:
            if letter == "M":
                conv = torch.zeros(batch_size, config.conv_kernel - 1, config.conv_dim, **kind)
                shape = (batch_size, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                layers.append(MambaState(conv, torch.zeros(shape, device=like.device, dtype=state)))
            elif letter == "*":
                shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)
                layers.append(KeyValues(torch.zeros(shape, **kind), torch.zeros(shape, **kind)))
            else:
                layers.append(None)
        return cls(layers)

    def begin(self) -> None:
        """A forward pass begins: what was recorded of the last one is of no use any more."""
        self.begun = self.length
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.replay = None

    def advance(self, tokens: int) -> None:
        """A forward pass has put in so many tokens."""
        self.length += tokens

    def clone(self) -> HybridCache:
        """A copy that shares no memory; what was recorded is not copied."""
        layers: list[MambaState | KeyValues | None] = []
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layers.append(MambaState(layer.conv.clone(), layer.ssm.clone()))
            elif isinstance(layer, KeyValues):
                layers.append(KeyValues(**{n: t.clone() for n, t in layer.tensors().items()}, length=layer.length))
            else:
                layers.append(None)
        return HybridCache(layers, self.length, self.record, self.seed, self.length)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (n,) int64, in this order; a row may be named several times."""
        for layer in self.layers:
            if layer is None:
                continue
            for name, tensor in layer.tensors().items():
                setattr(layer, name, tensor.index_select(0, rows.to(tensor.device)))
            if isinstance(layer, MambaState):
                layer.replay = None
        self.begun = self.length

    def join(self, others: Sequence[HybridCache]) -> None:
        """Put the rows of others behind these; a shorter cache is padded in front, which the mask has to hide.

        What was recorded is forgotten.
        """
        caches = [self, *others]
        self.length = self.begun = max(cache.length for cache in caches)
        for number, layer in enumerate(self.layers):
            if layer is None:
                continue
            parts = [cache.layers[number].tensors() for cache in caches]  # type: ignore[union-attr]
            if isinstance(layer, KeyValues):
                layer.key, layer.value = (
                    rows_behind([p[name] for p in parts], self.length) for name in ("key", "value")
                )
                layer.length = self.length
            else:
                layer.conv, layer.ssm = (torch.cat([p[name] for p in parts]) for name in ("conv", "ssm"))
                layer.replay = None

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on.

        Raises:
            ValueError: if there are fewer, or a Mamba layer cannot go back so far.
        """
        if length == self.length:
            return
        if not 0 <= length < self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        batch = next((t.shape[0] for layer in self.layers if layer for t in layer.tensors().values()), 0)
        self._rewind(torch.full((batch,), max(length - self.begun, 0)), length)
        for layer in self.layers:
            if isinstance(layer, KeyValues):
                layer.length = length
        self.length = self.begun = length

    def keep(self, counts: torch.Tensor) -> None:
        """Forget, row by row, all but the first ``counts`` tokens of the last forward pass.

        The columns stay: the caller marks the forgotten ones as padding in the attention mask from then on.

        Args:
            counts: (B,) int64.

        Raises:
            ValueError: if that pass was not recorded.
        """
        self._rewind(counts, self.begun)
        self.begun = self.length

    def _rewind(self, counts: torch.Tensor, length: int) -> None:
        states = [layer for layer in self.layers if isinstance(layer, MambaState)]
        if states and (length < self.begun or any(layer.replay is None for layer in states)):
            raise ValueError(
                f"a Mamba layer cannot go back to {length} tokens: it can go back once, over the last forward pass, if "
                "cache.record was True then; or clone() the cache"
            )
        for layer in states:
            assert layer.replay is not None
            layer.conv, layer.ssm = layer.replay(counts.to(layer.ssm.device))
            layer.replay = None

    def bytes(self) -> dict[str, int]:
        """Size of what is in use, not of room for more: ``states`` (the same at any length) and ``key_values``."""
        sizes = {"states": 0, "key_values": 0}
        for layer in self.layers:
            name = "states" if isinstance(layer, MambaState) else "key_values"
            sizes[name] += sum(t.numel() * t.element_size() for t in (layer.tensors() if layer else {}).values())
        return sizes

    def save(self, path: Path) -> None:
        """Write it to a safetensors file, aside and then renamed."""
        from safetensors.torch import save_file

        tensors = {
            f"{number}.{name}": tensor.contiguous()
            for number, layer in enumerate(self.layers)
            if layer
            for name, tensor in layer.tensors().items()
        }
        about = {"length": self.length, "layers": len(self.layers), "record": self.record, "seed": self.seed}
        aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        save_file(tensors, aside, {"format": _FORMAT, "about": json.dumps(about)})
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path, empty: HybridCache) -> HybridCache:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            empty: an empty cache of the model that it is for.

        Raises:
            BadDataError: if it is another model's.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BadDataError(f"{path} cannot be read as a cache: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise BadDataError(f"{path} is no cache of a hybrid stack")
        about = json.loads(metadata["about"])
        wanted = {f"{i}.{n}": t for i, layer in enumerate(empty.layers) if layer for n, t in layer.tensors().items()}
        if set(wanted) != set(tensors) or about["layers"] != len(empty.layers):
            raise BadDataError(f"{path} is a cache of a model with other layers")
        rows = {len(tensor) for tensor in tensors.values()}
        for name, tensor in wanted.items():
            got, room = tensors[name], list(tensor.shape)
            if name.endswith(("key", "value")):
                room[2] = about["length"]
            if list(got.shape[1:]) != room[1:] or got.dtype != tensor.dtype or len(rows) != 1:
                raise BadDataError(
                    f"{path}: {name} is {tuple(got.shape)} {got.dtype}, and the model has {tuple(room)} {tensor.dtype}"
                )
        layers: list[MambaState | KeyValues | None] = []
        for number, layer in enumerate(empty.layers):
            own = {n: tensors[f"{number}.{n}"].to(t.device) for n, t in (layer.tensors() if layer else {}).items()}
            if isinstance(layer, MambaState):
                layers.append(MambaState(**own))
            elif isinstance(layer, KeyValues):
                layers.append(KeyValues(**own, length=about["length"]))
            else:
                layers.append(None)
        return cls(layers, about["length"], about["record"], about["seed"], about["length"])


def round_stochastically(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """float32 to float16, up or down with the probability that makes the mean exact.

    Super and Ultra keep their SSM states so; rounding to nearest loses small updates for good (facts: 2.3 % of
    accuracy against 0.3 %). Paper: arXiv:2604.12374.

    Args:
        x: float32 of any shape. What exceeds float16 is rounded to its largest number.
        generator: the source of the noise.
    """
    # A float16 has 10 bits behind the point, and its exponent does not go below -14.
    exponent = torch.frexp(x)[1].clamp(min=-13) - 1
    step = torch.ldexp(torch.ones_like(x), exponent - 10)
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    limit = torch.finfo(torch.float16).max
    return ((x / step + noise).floor() * step).clamp(-limit, limit).to(torch.float16)


def state_noise(seed: int, layer: int, length: int, device: torch.device) -> torch.Generator:
    """The noise of one rounding: a function of (seed, layer, tokens seen)."""
    from bestiary.shared.core.streams import derive_seed

    return torch.Generator(device).manual_seed(derive_seed(seed, "ssm state", layer, length))
