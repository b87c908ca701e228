"""metrics.csv, which every run writes, and Weights & Biases beside it."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import require


class MetricsFile:
    """metrics.csv of a run: one row a logged step, ``stage`` and ``step`` first, blank where a metric is absent.

    Rows are appended; a new metric rewrites the file aside with one more column. Opening it again at an earlier step
    drops the rows beyond that step, so that a resumed run's file equals an unbroken one's.

    Args:
        file: the path.
    """

    def __init__(self, file: Path):
        self.file = file
        self.columns = ["stage", "step"]
        self.rows: list[dict[str, str]] = []
        if file.is_file():
            # A last line without its end was cut short by a full disk; what is left of it may read as another step.
            text = file.read_bytes().decode()
            whole = text[: text.rfind("\n") + 1]
            reader = csv.DictReader(io.StringIO(whole, newline=""))
            self.columns = list(reader.fieldnames or self.columns)
            self.rows = [{k: v for k, v in row.items() if k and v} for row in reader]
            if whole != text:
                self._rewrite()

    def rewind(self, stage: str, step: int) -> None:
        """Drop this stage's rows beyond ``step``."""
        kept = [r for r in self.rows if not (r.get("stage") == stage and int(float(r.get("step") or 0)) > step)]
        if len(kept) != len(self.rows):
            self.rows = kept
            self._rewrite()

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Add metrics to the row of (stage, step)."""
        new = [name for name in metrics if name not in self.columns]
        row = {"stage": stage, "step": str(step)} | {k: f"{v:.8g}" for k, v in metrics.items()}
        last = self.rows[-1] if self.rows else {}
        same = last.get("stage") == stage and last.get("step") == str(step)
        if same:
            last.update(row)
        else:
            self.rows.append(row)
        if new or same or not self.file.is_file():
            self.columns += new
            self._rewrite()
        else:
            with open(self.file, "a", newline="") as handle:
                csv.DictWriter(handle, self.columns).writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        aside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        aside.write_text(text.getvalue())
        os.replace(aside, self.file)


def wandb_mode(wanted: str) -> str:
    """``online`` if W&B has credentials here, else ``offline``; ``wanted`` other than ``auto`` is kept."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return "online" if netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore") else "offline"


class WandbLog:
    """Sends metrics to W&B; whatever it does wrong is said once and never stops a run.

    Args:
        options: the ``logger.wandb`` node.
        run_dir: where W&B writes.
        name: the run's name.
        config: the resolved config.
    """

    def __init__(self, options: dict[str, Any], run_dir: Path, name: str, config: dict[str, Any]):
        self.run: Any = None
        mode = wandb_mode(options["mode"])
        if mode == "offline" and options["mode"] == "auto":
            print("W&B: no credentials, logging offline; `wandb sync` sends it later", flush=True)
        try:
            wandb = require("wandb", "wandb")
            self.run = wandb.init(
                project=options["project"],
                entity=options["entity"],
                id=options["id"] or os.environ.get("WANDB_RUN_ID"),
                tags=list(options["tags"]) or None,
                name=name,
                dir=str(run_dir),
                mode=mode,
                config=config,
                resume="allow",
                # What W&B prints at the end of an offline run would bury the run's own report.
                settings=wandb.Settings(silent=mode == "offline"),
            )
        except Exception as error:
            self._say(error)

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Log metrics of one step."""
        if self.run is None:
            return
        try:
            self.run.log({"stage": stage, "stage_step": step, **metrics})
        except Exception as error:
            self._say(error)
            self.run = None

    def finish(self) -> None:
        """End the W&B run."""
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._say(error)

    def _say(self, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"W&B is left out of this run: {reason}", flush=True)
