"""One run from a composed config to result.json: what tools/train.py does after Hydra."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bestiary.shared.core.build import build, check_node
from bestiary.shared.core.callbacks import StopRun
from bestiary.shared.core.checkpoint import find_checkpoint, load_checkpoint, write_json
from bestiary.shared.core.config import check_choices, compose, conf_dir, differences, resolved
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.estimate import refuse_what_cannot_fit
from bestiary.shared.core.evaluate import evaluate_all
from bestiary.shared.core.loggers import MetricsFile, WandbLog
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.runs import FinishedRun, Run, add_wall_time, device_name, open_run, rank, write_result
from bestiary.shared.core.stages import (
    Setting,
    Stage,
    auto_precision,
    device_of,
    final_split,
    first_structure,
    module_class,
    read_evaluations,
    read_stages,
    run_stages,
)


def train(cfg: DictConfig, choices: dict[str, str], overrides: list[str], compared: bool = False) -> dict[str, Any]:
    """Run a recipe: check, train its stages, evaluate the held-out part, compare, report.

    Args:
        cfg: the composed config.
        choices: the option of each group.
        overrides: the command line.
        compared: this is a run beside another, which reports for both.

    Returns:
        What result.json holds.
    """
    began = time.monotonic()
    setting = prepare_run(cfg, choices, overrides)
    run = setting.run
    try:
        if (run.folder / "result.json").is_file():
            print(f"this run is finished: {run.folder}", flush=True)
            return json.loads((run.folder / "result.json").read_text())
        model, _ = run_stages(setting)
        limit = setting.debug.get("max_held_out")
        metrics = {} if rank() else evaluate_all(model, setting.source, setting.evaluations, setting.final_split, limit)
        finished = FinishedRun(run.folder, metrics, setting.source, evaluations=setting.evaluations)
        finished.split, finished.scope = setting.final_split, scope(setting)
        _compare(setting, finished)  # on every rank: its runs are distributed as this one is
        if rank():
            return {"metrics": {}}
        baselines: Any = getattr(setting.source, "baselines", None)
        if baselines is not None:
            finished.baselines = baselines() | finished.baselines
        lines = [] if compared else [*module_class(cfg).report(model, finished), f"run folder  {run.folder}"]
        result = write_result(run, metrics, setting.source.revision, began, scope(setting))
        print("\n".join(["", *lines] if lines else [f"done: {run.folder}"]), flush=True)
        return result
    except (StopRun, KeyboardInterrupt):
        if rank() == 0:
            print(f"stopped; the same command goes on from here: {run.folder}", flush=True)
            add_wall_time(run, began)
        raise
    finally:
        if setting.wandb is not None:
            setting.wandb.finish()
        run.close()


def prepare_run(cfg: DictConfig, choices: dict[str, str], overrides: list[str]) -> Setting:
    """Everything that can be refused is refused here, before anything is allocated; then the run folder is opened."""
    check_choices(cfg)
    values = resolved(cfg)
    for part in ("model", "encoder", "backbone", "dataset", "recipe", "trainer"):
        check_node(without_missing(values.get(part)), part)
    module_class(cfg)
    stages = read_stages(cfg)
    source = build(cfg.dataset)
    source.check()
    evaluations = read_evaluations(cfg)
    run = Run(Path(), values, choices, overrides, "")
    split = final_split(source, evaluations)
    setting = Setting(cfg, run, source, source.spec(), evaluations, split, MetricsFile(Path(os.devnull)))
    if cfg.init_from:
        find_checkpoint(cfg.init_from)
    else:
        refuse_what_cannot_fit(first_structure(setting), next(iter(stages.values())), source, cfg)
    setting.run = open_run(cfg, choices, overrides)
    if rank() == 0:
        say_size(cfg, choices, stages)
        device = device_of(cfg)
        precision = auto_precision(cfg) if cfg.trainer.precision == "auto" else cfg.trainer.precision
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"on {device_name() if device.type == 'cuda' else 'the CPU'}{threads}, precision {precision}", flush=True)
        print(f"{'resuming' if setting.run.resumed else 'run'} {setting.run.folder}", flush=True)
        setting.metrics = MetricsFile(setting.run.folder / "metrics.csv")
        if cfg.logger.wandb is not None:
            name = f"{values['project']['name']}/{setting.run.folder.name}"
            setting.wandb = WandbLog(values["logger"]["wandb"], setting.run.folder, name, values)
    return setting


def say_size(cfg: DictConfig, choices: dict[str, str], stages: dict[str, Stage]) -> None:
    """Say when a run is of the paper's size, because nobody has written laptop numbers for its data set."""
    paper = conf_dir() / "paper" / choices["project"] / f"{choices['recipe']}.yaml"
    if not paper.is_file() or "recipe" not in (numbers := OmegaConf.load(paper)):
        return
    if numbers.recipe.get("steps") == cfg.recipe.get("steps"):
        sizes = ", ".join(f"{name} {s.steps:,} steps of {s.batch_size}" for name, s in stages.items())
        print(
            f"this is the paper's size ({sizes}): conf/tuned has no laptop numbers for dataset={choices['dataset']}. "
            "The first steps will say how long it takes; recipe.steps, recipe.batch_size and encoder.features "
            "make it small",
            flush=True,
        )


def without_missing(node: Any) -> Any:
    """A node without its ``???`` leaves, which are reported when they are needed."""
    if isinstance(node, dict):
        return {k: without_missing(v) for k, v in node.items() if v != "???"}
    return node


def scope(setting: Setting) -> str:
    """``full``, or ``reduced: debug`` for a run that debug caps."""
    return "reduced: debug" if setting.debug else "full"


def _compare(setting: Setting, finished: FinishedRun) -> None:
    """Train and evaluate the same run with other choices, one folder each, and put the numbers beside ours."""
    if setting.debug.get("compare") is False:
        return
    for name, extra in (setting.cfg.compare or {}).items():
        print(f"\ncompared run: {name} ({' '.join(extra)})", flush=True)
        folder = finished.folder / "compare" / name
        overrides = [o for o in setting.run.overrides if not o.startswith(("paths.run_dir=", "resume=", "compare"))]
        cfg, choices = compose([*overrides, *extra, f"paths.run_dir='{folder}'", "compare=null"])
        result = train(cfg, choices, [*overrides, *extra], compared=True)
        finished.compared[name] = folder
        finished.baselines[name] = result["metrics"]


def load_run(path: str, overrides: list[str]) -> tuple[nn.Module, DataSource, DictConfig, list[str]]:
    """A checkpoint, its data source and its config.

    Args:
        path: run folder or stage folder.
        overrides: changes to the stored config (``dataset.root=…``); with none, the stored values are used.

    Returns:
        (model, source, config, lines that say where today's conf/ differs from what is stored).

    Raises:
        BadDataError: if there is no checkpoint. ConfigError: if it stands without its run, or an override is wrong.
    """
    folder = find_checkpoint(path)
    run_folder = next((p for p in (folder, *folder.parents) if (p / "run.json").is_file()), None)
    if run_folder is None:
        raise ConfigError(f"{folder} stands alone: there is no run.json above it that says which data it is scored on")
    head = json.loads((run_folder / "run.json").read_text())
    stored = OmegaConf.create((run_folder / "config.yaml").read_text())
    cfg: Any = stored
    changed = []
    try:
        today = resolved(compose(head["overrides"])[0])
        changed = differences(OmegaConf.to_container(stored), today)
        changed = [line for line in changed if not line.startswith(("paths.", "resume"))]
    except ConfigError as error:
        changed = [f"today's conf/ no longer composes this run: {error}"]
    if overrides:
        cfg = compose([*head["overrides"], *overrides])[0]
    OmegaConf.set_struct(cfg, True)
    check_node(without_missing(resolved(cfg)["dataset"]), "dataset")
    source = build(cfg.dataset)
    source.check()
    model, _ = load_checkpoint(folder)
    return model, source, cfg, changed


def evaluate_checkpoint(options: Any, overrides: list[str]) -> dict[str, float]:
    """What tools/eval_model.py does: score a checkpoint, print the numbers, and write them beside the weights.

    Args:
        options: conf/eval.yaml with its arguments.
        overrides: changes to the run's stored config.
    """
    if options.split not in ("val", "test"):
        raise ConfigError(f"split={options.split}: a data set holds out val and test")
    model, source, cfg, changed = load_run(options.checkpoint, overrides)
    for line in changed[:10]:
        print(f"differs from today's conf/ (the stored value is used): {line}", flush=True)
    debug = dict(cfg.get("debug") or {})
    model.to(pick_device(options.device))
    values = evaluate_all(model, source, read_evaluations(cfg), options.split, debug.get("max_held_out"))
    if not values:
        raise BadDataError(f"the {options.split} part of this data set is empty")
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.4f}")
    write_json(find_checkpoint(options.checkpoint) / f"eval_{options.split}.json", values)
    return values


def pick_device(wanted: str) -> torch.device:
    """The GPU if there is one and ``auto`` is wanted."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device={wanted}: there is no such kind of device") from error
