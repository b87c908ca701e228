"""BestiaryModule: the one Lightning base. It optimises by hand, one whole step at a time.

The loader yields a rank's whole step; the objective splits it into micro-batches; each is run backward, gradients are
synchronised on the last alone, scaled by world size / terms of the whole step, clipped, and applied; or all ranks skip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bestiary.shared.core.errors import UserError
from bestiary.shared.core.examples import Batch
from bestiary.shared.core.prepare import matches
from bestiary.shared.core.protocols import Objective, Schedule, StepContext
from bestiary.shared.core.streams import derive_seed


class BestiaryModule(pl.LightningModule):
    """Trains one stage of one model.

    Args:
        model: a :class:`~bestiary.shared.core.protocols.Model`.
        objective: what is minimised.
        optim: takes the parameter groups, returns the optimiser.
        schedule: (step, steps) to the factor on each group's learning rate.
        stage: the stage's name; with the seed it names the noise of every step.
        steps: optimiser steps of the stage.
        seed: the run's seed.
        clip: largest gradient norm, or None.
        no_decay: globs of parameters without weight decay.
        max_bad_steps: steps with a loss or gradient that is not finite, after which the run ends.

    Attributes:
        position: steps of this stage that are done; all that resuming needs besides weights and optimiser state.
        last_metrics: what the last step logged, means over the whole step.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optim: Callable[[Any], torch.optim.Optimizer],
        schedule: Schedule,
        stage: str = "train",
        steps: int = 1,
        seed: int = 0,
        clip: float | None = None,
        no_decay: tuple[str, ...] = (),
        max_bad_steps: int = 10,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.objective = objective
        self.position = 0
        self.bad_steps = 0
        self.stop_requested = False
        self.stop_agreed = False
        self.last_metrics: dict[str, float] = {}
        self.make_loader: Callable[[int, int, int], Any] | None = None
        self.loss_name: str = getattr(objective, "loss_name", "loss")
        self.headline: tuple[str, ...] = getattr(objective, "headline", ("loss",))
        self._make_optim, self._schedule = optim, schedule
        self.stage, self.steps, self.seed = stage, steps, seed
        self.clip, self.no_decay, self.max_bad_steps = clip, tuple(no_decay), max_bad_steps

    @classmethod
    def report(cls, model: nn.Module, run: Any) -> list[str]:
        """Lines to print when a run has ended; a project draws its pictures here.

        Args:
            model: the trained model.
            run: the :class:`~bestiary.shared.core.runs.FinishedRun`.
        """
        width = max((len(k) for k in run.metrics), default=0)
        return [f"{name:<{width}}  {value:.4f}" for name, value in run.metrics.items()]

    def train_dataloader(self) -> Any:
        """The steps that are left, for this rank; called when position and rank are known."""
        assert self.make_loader is not None
        return self.make_loader(self.position, self.global_rank, self.trainer.world_size)

    def configure_model(self) -> None:
        """Shard the units of the model's wrap policy when the strategy is FSDP2."""
        mesh = getattr(self, "device_mesh", None)
        if mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        units = tuple(self.model.wrap_policy())  # type: ignore[operator]
        for module in list(self.model.modules()):
            if units and isinstance(module, units):
                fully_shard(module, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The stage's optimiser over the trainable parameters, those of ``no_decay`` in a group of their own."""
        decay, plain = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (plain if matches(name, self.no_decay) else decay).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decay}]
        if plain:
            groups.append({"params": plain, "weight_decay": 0.0})
        return self._make_optim([g for g in groups if g["params"]])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimiser step over the rank's whole share of the batch."""
        optimizer: Any = self.optimizers()
        # Dropout and the like depend on where the run is, not on how it got there.
        torch.manual_seed(derive_seed(self.seed, self.stage, "noise", self.position, self.global_rank))
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * self._schedule(self.position, self.steps)

        context = StepContext(self.stage, self.position, self.global_rank, self.trainer.world_size)
        optimizer.zero_grad(set_to_none=True)
        sums = self._backward(batch, context)
        sums = self._reduce(sums)
        terms = float(sums.pop("terms"))
        bad = float(sums.pop("bad"))
        self.stop_agreed = bool(sums.pop("stop") > 0)
        self.stop_requested = self.stop_requested or self.stop_agreed
        metrics = {name: float(value) / terms if terms else 0.0 for name, value in sums.items()}

        if terms and not bad:
            norm = self._scale_and_norm(self.trainer.world_size / terms)
            metrics["grad_norm"] = float(norm)
            if torch.isfinite(norm):
                if self.clip is not None:
                    self.clip_gradients(optimizer, self.clip, "norm")
                optimizer.step()
            else:
                bad = 1.0
        if bad:
            self._skip(batch)
        metrics |= self._tell_modules(applied=not bad and terms > 0)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        self.position += 1
        self.last_metrics = metrics

    def _tell_modules(self, applied: bool) -> dict[str, float]:
        """Call ``after_step`` of what has it (a router balances its experts so); returns what they want logged."""
        metrics: dict[str, float] = {}
        for module in (*self.model.modules(), self.objective):
            after_step = getattr(module, "after_step", None)
            if callable(after_step):
                found: Any = after_step(applied)
                metrics.update(found or {})
        return metrics

    def _backward(self, batch: Batch, context: StepContext) -> dict[str, torch.Tensor]:
        """Backward of every micro-batch; returns this rank's sums."""
        experience = getattr(self.objective, "experience", None)
        if experience is not None:
            batch = experience(self.model, batch, context)
        parts = self.objective.micro_batches(batch)
        total: dict[str, torch.Tensor] = {}
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self._no_sync() if not last else nullcontext():
                loss = self.objective.loss(self.model, part, context)
                # A loss that is not finite still goes backward: the other ranks wait for its gradients.
                self.manual_backward(loss.loss_sum)
            values = {self.loss_name: loss.loss_sum.detach(), "terms": torch.as_tensor(loss.num_terms)} | loss.metrics
            values["bad"] = 1.0 - torch.isfinite(values[self.loss_name]).double()
            for name, value in values.items():
                total[name] = total.get(name, 0) + value.detach().double().to(self.device)  # type: ignore[operator]
        total["stop"] = torch.tensor(float(self.stop_requested), dtype=torch.float64, device=self.device)
        return total

    def _no_sync(self) -> Any:
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _reduce(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, in one message."""
        if self.trainer.world_size == 1:
            return sums
        names = sorted(sums)
        packed = torch.stack([sums[n] for n in names])
        torch.distributed.all_reduce(packed)
        return dict(zip(names, packed, strict=True))

    def _scale_and_norm(self, factor: float) -> torch.Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, factor)
        norm = nn.utils.get_total_norm(grads)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _skip(self, batch: Batch) -> None:
        self.bad_steps += 1
        message = (
            f"stage {self.stage}, step {self.position}: the loss or its gradient is not finite; step skipped "
            f"({self.bad_steps} of at most {self.max_bad_steps}); examples {', '.join(batch['ids'][:8])}"
        )
        print(message, flush=True)
        if self.bad_steps >= self.max_bad_steps:
            raise UserError(f"{message}\nToo many such steps: lower recipe.lr, or set trainer.precision=32-true.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record where the stage is."""
        state = getattr(self.objective, "state_dict", None)
        checkpoint["bestiary"] = {
            "stage": self.stage,
            "position": self.position,
            "bad_steps": self.bad_steps,
            "objective": state() if callable(state) else None,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from there."""
        state = checkpoint["bestiary"]
        self.position, self.bad_steps = state["position"], state["bad_steps"]
        if state["objective"] is not None:
            self.objective.load_state_dict(state["objective"])  # type: ignore[attr-defined]
