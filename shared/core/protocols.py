"""The few protocols that make parts fit. Nothing here is inherited; a part fits if it has these members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from bestiary.shared.core.examples import Batch, Example, Mode
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream


@dataclass
class Output:
    """What ``Model.forward`` returns.

    Attributes:
        logits: (B, T, V) of a language model; (B, C, *S) of a segmentation net, full resolution.
        aux_logits: lower resolutions of deep supervision, fine to coarse, without the full one; or, in training, the
            logits of a language model's multi-token heads: entry d (B, T, V) predicts token t + 2 + d.
        hidden: last hidden states (B, T, D), where a model has them.
        cache: the decoding cache, where a model has one.
        aux_losses: router balancing and the like, by name; an objective adds those it knows.
    """

    logits: torch.Tensor
    aux_logits: list[torch.Tensor] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    cache: Any = None
    aux_losses: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    The distribution is that of the logits over ``temperature``, cut to the ``top_k`` likeliest tokens, then to the
    smallest set that holds ``top_p`` of what is left, then to those at least ``min_p`` times as likely as the
    likeliest, and renormalised. The order is transformers'.

    Attributes:
        max_new_tokens: longest completion.
        temperature: 0 is greedy.
        top_p: 1 keeps all.
        seed: of the noise, see ``Model.generate``.
        stop: a row ends with the token that completes one of these strings.
        top_k: 0 keeps all.
        min_p: 0 keeps all.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0


@dataclass
class Rollout:
    """What ``Model.generate`` returns, n rows for each row of the batch, row-major.

    Attributes:
        completion_ids: (B*n, T) int64, right-padded.
        mask: (B*n, T) bool, true on the policy's own tokens (the end token included); false on padding, and on tokens
            that a budget for thoughts put there.
        logprobs: (B*n, T) float32, log-probabilities under the distribution that was sampled from.
        texts: decoded completions.
        finish_reasons: ``stop`` or ``length``.
        entropies: (B*n, T) float32, of the distribution over ``temperature`` before cuts, in nats; None where nobody
            asked for it.
        lengths: (B*n,) int64, tokens of each row, forced ones included.
    """

    completion_ids: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    texts: list[str]
    finish_reasons: list[str]
    entropies: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


@runtime_checkable
class Processor(Protocol):
    """Examples to a batch: the only place that knows tokenizer, template, tiling, mel and token counts."""

    def __call__(self, examples: Sequence[Example], mode: Mode) -> Batch: ...


@runtime_checkable
class DataSource(Protocol):
    """A data set. Made without reading data; :meth:`check` says whether the data is there.

    A source that takes from files what its config leaves open (a plan, lists of cases) also has three members, with
    which a run keeps to what it began with (:mod:`bestiary.shared.core.recorded_data`). ``state() -> dict``: what it
    took, as JSON; its ``options``, if any, are config values that stand for the files. ``adopt(state, changed)``: take
    that over, called after it was made and before :meth:`check`, with the names of those of its options that were said
    anew since. ``seen(state, split) -> list``: which held-out ids a run with that state was trained on.
    One with ``remarks(config) -> list`` gives lines to print as a run starts.

    ``part`` picks one of the source's named parts (``text`` and ``chat`` of one corpus); None is the whole.
    """

    revision: str
    """Version or hash of the data, recorded with every number."""

    def spec(self) -> DataSpec:
        """The spec, from configuration or a plan file alone."""
        ...

    def check(self) -> None:
        """Raise MissingDataError (with the remedy) or BadDataError before anything else is done."""
        ...

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Sample k of a stream, augmentation included: a pure function of its arguments."""
        ...

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The ``val`` or ``test`` examples, whole and in a fixed order; read lazily where they are large."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """An image or audio encoder: tokens with counts, or a pyramid ``[(B, C_i, *S_i)]``, fine to coarse."""

    out_dim: int

    def preprocess(self, raw: Any) -> tuple[dict[str, torch.Tensor], int]:
        """Features of one raw item, and how many tokens it will become."""
        ...

    def forward(self, **features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, out_dim) of all items, and counts (n,)."""
        ...


@runtime_checkable
class PyramidEncoder(Protocol):
    """An encoder of a segmentation net.

    One with a true ``gives_orders`` takes a list as a second argument of forward, to which it appends its mixers' scan
    orders. ``num_mixers`` says how many levels have a mixer, ``decoder_convs`` how many convolutions a decoder's level
    has in plans with this encoder, and ``report_name`` what reports call a net of it without mixers; all are optional.

    Attributes:
        channels: output channels of each level, fine to coarse.
        strides: stride of each level against the one before.
        kernel_sizes: kernel of each level.
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, *S) to ``[(B, C_i, *S_i)]``, fine to coarse."""
        ...


@runtime_checkable
class TokenMixer(Protocol):
    """Builds the mixer of one level of a segmentation net (``kind: mixer`` in conf/backbone)."""

    def build(self, dim: int, spatial_dims: int, level: int) -> nn.Module | None:
        """A module (B, dim, *S) -> (B, dim, *S), or None where this level has no mixer."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back, and the chat template.

    Attributes:
        pad_id, eos_id: special tokens; ``eos_id`` ends a text.
        stop_ids: tokens that end an answer, ``eos_id`` among them where a template uses it so.
        vocab_size: all tokens, added ones included.
        key: name and content hash: what was tokenised under one key is valid for no other.
    """

    pad_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    key: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are never read from it, and none is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens are left out."""
        ...

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens (known ones keep their id) and return their ids."""
        ...

    def chat(
        self, messages: Sequence[Any], add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a chat, and which of them the assistant wrote; ``thinking`` None is the template's default."""
        ...


@runtime_checkable
class Cache(Protocol):
    """What a decoder remembers of the tokens it has seen, for a batch of rows.

    One with a true ``joinable`` also has ``join(others)``, which puts the rows of other caches behind its own, shorter
    ones padded in front: prompts of different lengths are then read apart (:mod:`bestiary.shared.language.prefill`).

    Attributes:
        length: tokens a row has had, padding included: the width of the attention mask without the new tokens.
    """

    length: int

    def clone(self) -> Cache:
        """A copy that shares no memory."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on. A recurrent state can go back over recorded tokens alone."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        ...

    def bytes(self) -> dict[str, int]:
        """Size in use by kind: ``states``, which a longer row does not grow, and ``key_values``, which it does."""
        ...

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        ...


@runtime_checkable
class LanguageBackbone(Protocol):
    """A decoder-only language model behind one face (``kind: lm`` in conf/backbone).

    One whose caches can be saved also has ``load_cache(path)``; one through whose caches gradients flow says so with
    ``cache_carries_gradient = True``.
    """

    hidden_size: int
    tokenizer: Any

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 to (B, T, hidden_size)."""
        ...

    def new_cache(self, batch_size: int) -> Any:
        """An empty decoding cache (:class:`Cache`) for ``batch_size`` rows."""
        ...

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens, growing the embedding where needed; returns their ids."""
        ...

    def layer_classes(self) -> set[type[nn.Module]]:
        """Classes of its layers; a model's ``wrap_policy`` hands them to FSDP."""
        ...

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Returns (logits, last hidden states, cache). ``logits_to_keep`` 0 keeps all positions."""
        ...


@runtime_checkable
class Model(Protocol):
    """What the stage runner trains, evaluates and saves; an nn.Module with these members.

    A model with an attribute ``tasks`` is refused data of any other task, before anything is read.

    A model whose prompts hold more than text has ``embed(batch) -> (B, T, D)``, the embedded prompts with everything in
    them; rollouts and their scoring encode a prompt once with it, however many completions it gets.

    A model that must remember something of its data beyond the spec (an image's normalisation) also has
    ``adapt_to(source)``, called once before a run's first stage; it keeps what it learns in a buffer.

    Any module inside it may have ``after_step(applied) -> {name: number}``: it is called on all processes after each
    optimiser step, with false after one that was skipped; the numbers are logged.
    """

    def processor(self) -> Processor: ...

    def forward(self, batch: Batch) -> Output: ...

    def generate(self, batch: Batch, n: int, sampling: Sampling) -> Rollout: ...

    def predict(self, inputs: Sequence[Path | str], out_dir: Path) -> list[Path]:
        """Read the inputs, write the answers under ``out_dir``, and return the paths written.

        A model that answers questions about media also takes ``question``, ``facts`` and ``max_new_tokens``.
        """
        ...

    def wrap_policy(self) -> set[type[nn.Module]]:
        """Module classes that FSDP shards and activation checkpointing recomputes as one unit."""
        ...


@dataclass(frozen=True)
class StepContext:
    """Where a loss is being computed."""

    stage: str
    step: int
    rank: int = 0
    world_size: int = 1


@dataclass
class Loss:
    """What ``Objective.loss`` returns.

    Attributes:
        loss_sum: sum over terms, a scalar with a gradient; the runner divides by the terms of the whole step.
        num_terms: how many terms the sum has (samples, tokens).
        metrics: detached sums to log, each divided by ``num_terms`` over the whole step.
    """

    loss_sum: torch.Tensor
    num_terms: torch.Tensor | float
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """What a recipe's stage minimises.

    An objective whose data the model itself makes (rollouts) has two members more. ``loader(data) -> Iterable`` takes
    the :class:`~bestiary.shared.core.loader.StageData` and yields what the steps of this rank begin with, one item a
    step; its length is that of the whole stage. ``experience(model, batch, ctx) -> Batch`` turns such an item into the
    batch to learn from, inside the step. One with state has ``state_dict`` and ``load_state_dict``: they go into
    checkpoints. One with ``after_step(applied) -> {name: number}`` is told, as modules are, and what it returns is
    logged as it stands. One with ``close()`` is told when its stage is over. ``loss_name`` is what the loss is logged
    as, and ``headline`` names the numbers that progress shows.
    """

    def loss(self, model: nn.Module, batch: Batch, ctx: StepContext) -> Loss: ...

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """Split a rank's whole step into what fits; the gradients add up to those of the whole."""
        ...


@runtime_checkable
class EvalProtocol(Protocol):
    """How a model is scored: a name and version that go with every number, and the scoring itself."""

    name: str
    version: str

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]: ...


Schedule = Callable[[int, int], float]
"""(step, steps) to the factor on the learning rate."""

Transform = Callable[[nn.Module], nn.Module]
"""A ``prepare`` step: changes the module tree (LoRA, quantise, prune, freeze) and returns the model."""
