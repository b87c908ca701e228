"""run_stages: a folder per stage; done ones are skipped, a begun one goes on, and a killed one loses little."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from bestiary.shared.core.build import build, nearest, to_plain
from bestiary.shared.core.callbacks import Checkpoint, HeldOut, Log, Progress
from bestiary.shared.core.checkpoint import (
    Structure,
    apply_prepare,
    build_model,
    find_checkpoint,
    load_structure,
    load_weights,
    save_checkpoint,
    write_json,
)
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.evaluate import evaluate_all
from bestiary.shared.core.loader import (
    Blend,
    RankSteps,
    StageData,
    StreamDataset,
    phase_starts,
    train_loader,
)
from bestiary.shared.core.loggers import MetricsFile, WandbLog
from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.core.prepare import set_trainable
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.recipe import Stage, read_stages
from bestiary.shared.core.runs import Run
from bestiary.shared.core.schedules import Constant
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream


@dataclass
class Setting:
    """What all stages of a run share."""

    cfg: DictConfig
    run: Run
    source: DataSource
    spec: DataSpec
    evaluations: dict[str, tuple[Any, str | None]]
    final_split: str
    metrics: MetricsFile
    wandb: WandbLog | None = None

    @property
    def debug(self) -> dict[str, Any]:
        """The debug node, empty for a real run."""
        return dict(self.cfg.get("debug") or {})


def read_evaluations(cfg: DictConfig) -> dict[str, tuple[Any, str | None]]:
    """Build the protocols of ``recipe.evaluations``: name to (protocol, part); a null entry is left out.

    Raises:
        ConfigError: if a stage asks for one that is not there.
    """
    nodes = {name: node for name, node in to_plain(cfg.recipe.get("evaluations") or {}).items() if node}
    for stage in cfg.recipe.run:
        for name in cfg.recipe.stages[stage].get("evaluate") or []:
            if name not in nodes:
                raise ConfigError(
                    f"recipe.stages.{stage}.evaluate names {name!r}{nearest(name, nodes)}; "
                    f"recipe.evaluations has {', '.join(nodes) or 'none'}"
                )
    return {name: (build(node["protocol"]), node.get("part")) for name, node in nodes.items()}


def run_stages(setting: Setting) -> tuple[nn.Module, Structure]:
    """Run the recipe's stages, and return the model after the last.

    Each stage starts from the files of the one before, in an unbroken run as in a resumed one.
    """
    previous: Path | None = None
    init_from = setting.cfg.init_from
    if init_from:
        previous = find_checkpoint(init_from)
    for name, stage in read_stages(setting.cfg).items():
        folder = setting.run.stages / name
        if (folder / "DONE").is_file():
            print(f"stage {name}: done before", flush=True)
        else:
            _run_stage(setting, name, stage, folder, previous)
        previous = folder
    assert previous is not None
    structure = load_structure(previous)
    model = build_model(structure)
    load_weights(model, previous)
    return model.to(device_of(setting.cfg)).eval(), structure


def first_structure(setting: Setting) -> Structure:
    """The structure of a model that starts from nothing."""
    config = setting.run.config
    return Structure(
        project=config["project"]["name"],
        choices=setting.run.choices,
        overrides=setting.run.overrides,
        spec=setting.spec.to_dict(),
        parts={name: config.get(name) or None for name in ("model", "encoder", "backbone")},
        seed=config["seed"],
    )


def model_before(setting: Setting, stage: Stage, previous: Path | None) -> tuple[nn.Module, Structure]:
    """The model a stage begins with: the checkpoint before it (or fresh weights), and its own prepare steps."""
    structure = first_structure(setting)
    if previous is not None:  # same net, checked before; what was done to its tree since goes on
        stored = load_structure(previous)
        structure.prepare, structure.seed = stored.prepare, stored.seed
    model = build_model(structure)
    if previous is not None:
        load_weights(model, previous)
    for node in stage.prepare:
        model = apply_prepare(model, node, structure.seed, len(structure.prepare))
        structure.prepare.append(node)
    return model, structure


def _run_stage(setting: Setting, name: str, stage: Stage, folder: Path, previous: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model, structure = model_before(setting, stage, previous)
    adapt = getattr(model, "adapt_to", None)
    if callable(adapt) and name == setting.cfg.recipe.run[0]:
        adapt(setting.source)
    set_trainable(model, stage.trainable)
    module = make_module(setting, name, stage, model)
    last = folder / "last.ckpt"
    module.make_loader = partial(make_loader, setting, name, stage, model, module.objective)
    trainer, log = make_trainer(setting, stage, last)
    if last.is_file():
        print(f"stage {name}: goes on from its last checkpoint", flush=True)
    trainer.fit(module, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    close = getattr(module.objective, "close", None)
    if callable(close):
        close()
    model = gathered(setting, stage, previous, model)
    if trainer.is_global_zero:
        model.to(device_of(setting.cfg))
        values = score(setting, stage, model)
        log.write(name, stage.steps, values)
        save_checkpoint(folder, model, structure)
        write_json(folder / "metrics.json", values)
        write_json(folder / "DONE", {"steps": stage.steps})
        last.unlink(missing_ok=True)
    trainer.strategy.barrier()


def gathered(setting: Setting, stage: Stage, previous: Path | None, model: nn.Module) -> nn.Module:
    """The whole model on the CPU; one that FSDP has sharded is put together from all ranks."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model.to("cpu")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)  # every rank takes part, the first gets it
    whole, _ = model_before(setting, stage, previous)
    if state:
        whole.load_state_dict(state)
    return whole


def make_module(setting: Setting, name: str, stage: Stage, model: nn.Module) -> BestiaryModule:
    """The project's LightningModule around a model, for one stage."""
    target = module_class(setting.cfg)
    return target(
        model,
        build(stage.objective, model=model),
        build({**stage.optim, "_partial_": True}),
        build(stage.schedule) if stage.schedule else Constant(),
        stage=name,
        steps=stage.steps,
        seed=setting.cfg.seed,
        clip=stage.clip,
        no_decay=tuple(stage.no_decay),
        max_bad_steps=stage.max_bad_steps,
    )


def module_class(cfg: DictConfig) -> type[BestiaryModule]:
    """The project's LightningModule class, named by ``project.module``."""
    from bestiary.shared.core.build import resolve_target

    target = resolve_target(cfg.project.module, "project.module")
    if not (isinstance(target, type) and issubclass(target, BestiaryModule)):
        raise ConfigError(f"project.module: {cfg.project.module} is not a BestiaryModule")
    return target


def refuse_sharded(cfg: DictConfig, stages: dict[str, Stage]) -> None:
    """Raise ConfigError if the trainer shards the model and an objective needs all of it in every process."""
    from bestiary.shared.core.build import resolve_target
    from bestiary.shared.core.strategies import FullyShardedStrategy

    strategy: Any = cfg.trainer.get("strategy")
    target = strategy.get("_target_") if isinstance(strategy, DictConfig) else None
    if not target or resolve_target(target, "trainer.strategy") is not FullyShardedStrategy:
        return
    whole = []
    for name, stage in stages.items():
        objective = resolve_target(str(stage.objective.get("_target_")), f"recipe.stages.{name}.objective")
        if getattr(objective, "whole_model", False):
            whole.append(name)
    if whole:
        others = ",".join(name for name in stages if name not in whole)
        raise ConfigError(
            f"trainer=fsdp shards the model, and stage {', '.join(whole)} draws from it, for which every process has"
            " to hold all of it: run it apart, with trainer=ddp or on one device"
            + (f" (recipe.run=[{others}] now)" if others else "")
        )


def refuse_without_data(cfg: DictConfig, stages: dict[str, Stage], source: Any) -> None:
    """Refuse a run whose later stages have no data, so that none ends half-way.

    One example is drawn of every part of the run's source that a stage trains on; other sources of a blend are checked.

    Raises:
        UserError: what the source says.
    """
    drawn = set()
    for name, stage in stages.items():
        for entry in stage.blend.values() if stage.blend else [stage.data or {}]:
            if entry.get("dataset"):
                build(entry["dataset"]).check()
            elif entry.get("part") not in drawn:
                drawn.add(entry.get("part"))
                source.train_example(0, Stream(cfg.seed, name, stage.batch_size), entry.get("part"))


def make_loader(
    setting: Setting,
    name: str,
    stage: Stage,
    model: nn.Module,
    objective: Any,
    start: int,
    rank: int,
    world_size: int,
) -> Any:
    """The loader of one rank's share of a stage's steps, from step ``start`` on."""
    source = setting.source
    if stage.blend:
        source = Blend(
            [
                (build(entry["dataset"]) if entry.get("dataset") else source, entry.get("part"), entry.get("weight", 1))
                for entry in stage.blend.values()
            ],
            phase_starts(stage.phases or [], stage.steps),
        )
        source.check()
    stream = Stream(setting.cfg.seed, name, stage.batch_size)
    part = (stage.data or {}).get("part")
    processor = model.processor(**({"max_len": stage.max_len} if stage.max_len else {}))  # type: ignore[operator]
    if hasattr(objective, "loader"):
        folder = setting.run.stages / name
        data = StageData(source, part, stream, processor, start, stage.steps, rank, world_size, folder, stage.max_len)
        return objective.loader(data)
    repeat = stage.batch_size if setting.debug.get("repeat_batch") else None
    dataset = StreamDataset(source, stream, part, repeat)
    sampler = RankSteps(stage.steps, stage.batch_size, rank, world_size, start)
    return train_loader(dataset, sampler, processor, stage.num_workers)


def make_trainer(setting: Setting, stage: Stage, last: Path) -> tuple[pl.Trainer, Log]:
    """The Lightning Trainer of one stage, and the callback that writes its metrics."""
    options, debug = setting.cfg.callbacks, setting.debug
    log = Log(setting.metrics, setting.wandb, options.log_every_steps)
    callbacks: list[pl.Callback] = [log]
    if stage.eval_every and stage.evaluate:
        callbacks.append(HeldOut(partial(score, setting, stage), log, stage.eval_every))
    callbacks.append(Progress(options.log_every_steps))
    callbacks.append(Checkpoint(last, options.save_every_steps, options.save_every_minutes))
    profiler = None
    if debug.get("profiler") == "simple":
        profiler = SimpleProfiler(dirpath=str(setting.run.folder), filename=f"profile-{last.parent.name}")
    node = to_plain(setting.cfg.trainer)
    if node.get("precision") == "auto":
        node["precision"] = auto_precision(setting.cfg)
    quiet_lightning()
    trainer = build(
        node,
        callbacks=callbacks,
        logger=False,
        profiler=profiler,
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(setting.run.folder),
    )
    return trainer, log


def quiet_lightning() -> None:
    """Keep Lightning's banners, advertisements and known-harmless warnings out of what a user reads."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*You're resuming from a checkpoint that ended before the epoch ended.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def device_of(cfg: DictConfig) -> torch.device:
    """Where a run computes: the GPU if there is one and the trainer may use it."""
    gpu = cfg.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def auto_precision(cfg: DictConfig) -> str:
    """bf16-mixed on a GPU that computes in it, else 32-true."""
    return "bf16-mixed" if device_of(cfg).type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def score(setting: Setting, stage: Stage, model: nn.Module) -> dict[str, float]:
    """The stage's evaluations on the validation part; those without examples there are left out."""
    chosen = {
        name: setting.evaluations[name]
        for name in stage.evaluate
        if len(setting.source.held_out("val", setting.evaluations[name][1]))
    }
    return evaluate_all(model, setting.source, chosen, "val", setting.debug.get("max_held_out"))


def final_split(source: DataSource, evaluations: dict[str, tuple[Any, str | None]]) -> str:
    """The part a run is judged on: ``test``, or ``val`` where no evaluation has test examples.

    Raises:
        ConfigError: if there is no evaluation. BadDataError: if nothing is held out.
    """
    if not evaluations:
        raise ConfigError("recipe.evaluations is empty: a run is judged on one evaluation or more")
    for split in ("test", "val"):
        if any(len(source.held_out(split, part)) for _, part in evaluations.values()):
            return split
    raise BadDataError("this data set holds nothing out: neither its val nor its test part has an example")
