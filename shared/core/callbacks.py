"""What happens around the steps of a stage: checkpoints, held-out metrics, logging, progress."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.distributed.tensor import DTensor

from bestiary.shared.core.loggers import MetricsFile, WandbLog
from bestiary.shared.core.module import BestiaryModule


class StopRun(SystemExit):
    """A run that was told to stop and has saved where it is."""


class Checkpoint(pl.Callback):
    """Saves what a stage resumes from, every so many steps or minutes, and when told to stop.

    A checkpoint is written aside, flushed and renamed, so a run that is killed while writing keeps the one before.
    SIGTERM and SIGINT end the step, save, and stop; in a distributed run all ranks stop at the same step.

    Args:
        file: the checkpoint.
        every_steps: steps between saves, or None.
        every_minutes: minutes between saves, or None.
    """

    def __init__(self, file: Path, every_steps: int | None = None, every_minutes: float | None = None):
        self.file, self.every_steps, self.every_minutes = file, every_steps, every_minutes
        self.saved_at, self.saved_time = -1, time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: BestiaryModule) -> None:  # type: ignore[override]
        """Take the signals over from Lightning, whose handler would end the run without saving."""

        def stop(number: int, frame: Any) -> None:
            if pl_module.stop_requested:
                raise KeyboardInterrupt
            pl_module.stop_requested = True
            launcher = trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "procs"):
                for process in launcher.procs:
                    process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, stop)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: BestiaryModule, *_: Any) -> None:  # type: ignore
        """Save when due; stop when told to."""
        position = pl_module.position
        due = self.every_steps and position % self.every_steps == 0
        if self.every_minutes and trainer.world_size == 1:
            due = due or time.monotonic() - self.saved_time > 60 * self.every_minutes
        elif self.every_minutes:  # the ranks' clocks differ: let the first decide
            late = time.monotonic() - self.saved_time > 60 * self.every_minutes
            due = due or trainer.strategy.broadcast(late)
        # stop_requested was summed over the ranks inside the step, or arrived after it: then the next step counts.
        stop = pl_module.stop_requested and (trainer.world_size == 1 or pl_module.stop_agreed)
        if due or stop:
            self.save(trainer, position)
        if stop:
            raise StopRun(143)

    def save(self, trainer: pl.Trainer, position: int) -> None:
        """Write the checkpoint aside and rename it."""
        aside = self.file.with_name(f".{self.file.name}.part")
        trainer.save_checkpoint(aside, weights_only=False)
        if trainer.is_global_zero:
            with open(aside, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(aside, self.file)
        self.saved_at, self.saved_time = position, time.monotonic()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


class Log(pl.Callback):
    """Writes metrics.csv (and W&B), on the first rank.

    Args:
        metrics: the file. wandb: or None.
        every: steps between rows.
    """

    def __init__(self, metrics: MetricsFile, wandb: WandbLog | None, every: int):
        self.metrics, self.wandb, self.every = metrics, wandb, max(1, every)

    def on_train_start(self, trainer: pl.Trainer, pl_module: BestiaryModule) -> None:  # type: ignore[override]
        """Drop rows that will be written again."""
        if trainer.is_global_zero:
            self.metrics.rewind(pl_module.stage, pl_module.position)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: BestiaryModule, *_: Any) -> None:  # type: ignore
        """Log the step."""
        step = pl_module.position
        if trainer.is_global_zero and (step % self.every == 0 or step in (1, pl_module.steps)):
            self.write(pl_module.stage, step, {f"train/{k}": v for k, v in pl_module.last_metrics.items()})

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Write a row to the file and to W&B."""
        self.metrics.log(stage, step, values)
        if self.wandb is not None:
            self.wandb.log(stage, step, values)


class HeldOut(pl.Callback):
    """Evaluates on the validation part every so many steps, on the first rank; the others wait.

    A sharded model is run by all ranks together, since each holds only its part.

    Args:
        score: model to metrics. log: where they go. every: steps between.
    """

    def __init__(self, score: Callable[[nn.Module], dict[str, float]], log: Log, every: int):
        # Not self.log: Lightning gives every callback a method of that name.
        self.score, self.writer, self.every = score, log, every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: BestiaryModule, *_: Any) -> None:  # type: ignore
        """Evaluate when due; the end of the stage has an evaluation of its own."""
        step = pl_module.position
        if step % self.every == 0 and step < pl_module.steps:
            sharded = isinstance(next(pl_module.model.parameters()), DTensor)
            values = self.score(pl_module.model) if sharded or trainer.is_global_zero else {}
            if trainer.is_global_zero:
                self.writer.write(pl_module.stage, step, values)
                # Of many, the means tell most.
                first = sorted(values, key=lambda name: not name.endswith("/mean")) if len(values) > 6 else values
                shown = "  ".join(f"{name} {values[name]:.4f}" for name in list(first)[:6])
                print(f"{pl_module.stage} step {step}: {shown}", flush=True)
            trainer.strategy.barrier()


class Progress(pl.Callback):
    """A rich progress bar on a terminal, plain lines elsewhere, on the first rank.

    Args:
        every: steps between plain lines.
    """

    def __init__(self, every: int):
        self.every = max(1, every)
        self._bar: Any = None
        self._task: Any = None
        self._began, self._first = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: BestiaryModule) -> None:  # type: ignore[override]
        """Start the bar or the clock."""
        self._began, self._first = time.monotonic(), pl_module.position
        if trainer.is_global_zero and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                pl_module.stage, total=pl_module.steps, completed=pl_module.position, note=""
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: BestiaryModule, *_: Any) -> None:  # type: ignore
        """Show the step."""
        if not trainer.is_global_zero:
            return
        step, values = pl_module.position, pl_module.last_metrics
        note = "  ".join(f"{name} {values.get(name, float('nan')):.4f}" for name in pl_module.headline)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif step == self._first + 1 or step % self.every == 0 or step == pl_module.steps:
            pace = (time.monotonic() - self._began) / (step - self._first)
            left = pace * (pl_module.steps - step)
            print(
                f"{pl_module.stage} {step}/{pl_module.steps}  {note}  {pace:.2f} s/step  {duration(left)} left",
                flush=True,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
