"""One run from a composed config to result.json: what tools/train.py does after Hydra."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from bestiary.shared.core.build import build, check_node, nearest
from bestiary.shared.core.callbacks import StopRun
from bestiary.shared.core.checkpoint import (
    Structure,
    find_checkpoint,
    load_checkpoint,
    load_structure,
    read_json,
    write_json,
)
from bestiary.shared.core.config import check_choices, compose, conf_dir, differences, resolved
from bestiary.shared.core.config import options as option_names
from bestiary.shared.core.device import pick_device
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.estimate import refuse_what_cannot_fit
from bestiary.shared.core.evaluate import evaluate_all
from bestiary.shared.core.loggers import MetricsFile, WandbLog
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.recipe import Stage, read_stages
from bestiary.shared.core.recorded_data import (
    hand_over,
    named_after,
    record,
    refuse_trained_on,
    run_folder_of,
    say_remarks,
    stored_state,
    use_recorded_options,
)
from bestiary.shared.core.runs import FinishedRun, Run, add_wall_time, device_name, open_run, rank, write_result
from bestiary.shared.core.stages import (
    Setting,
    auto_precision,
    device_of,
    final_split,
    first_structure,
    module_class,
    read_evaluations,
    refuse_sharded,
    refuse_without_data,
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
    setting = prepare_run(cfg, choices, overrides, compared)
    run = setting.run
    try:
        if (run.folder / "result.json").is_file():
            print(f"this run is finished: {run.folder}", flush=True)
            return read_json(run.folder / "result.json")
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
            protocols = [protocol for protocol, _ in setting.evaluations.values()]
            finished.baselines = baselines(setting.final_split, protocols[0]) | finished.baselines
        # First the numbers, then the pictures: a report that fails loses nothing.
        result = write_result(run, metrics, setting.source.revision, began, scope(setting))
        lines = [] if compared else [*module_class(cfg).report(model, finished), f"run folder  {run.folder}"]
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


def prepare_run(cfg: DictConfig, choices: dict[str, str], overrides: list[str], compared: bool = False) -> Setting:
    """Everything that can be refused is refused here, before anything is allocated; then the run folder is opened.

    Args:
        cfg: the composed config.
        choices: the option of each group.
        overrides: the command line.
        compared: as in :func:`train`; such a run has no W&B run of its own, for only one can be open.
    """
    check_choices(cfg)
    values = resolved(cfg)
    for part in ("model", "encoder", "backbone", "dataset", "recipe", "trainer"):
        check_node(without_missing(values.get(part)), part)
    module_class(cfg)
    stages = read_stages(cfg)
    refuse_sharded(cfg, stages)
    source = build(cfg.dataset)
    source.check()
    evaluations = read_evaluations(cfg)
    run = Run(Path(), values, choices, overrides, "")
    split = final_split(source, evaluations)
    setting = Setting(cfg, run, source, source.spec(), evaluations, split, MetricsFile(Path(os.devnull)))
    if cfg.init_from:
        check_same_net(load_structure(find_checkpoint(cfg.init_from)), first_structure(setting))
    refuse_what_cannot_fit(first_structure(setting), next(iter(stages.values())), source, cfg)
    refuse_without_data(cfg, stages, source)
    setting.run = open_run(cfg, choices, overrides)
    if rank() == 0:
        say_size(cfg, choices, stages)
        say_remarks(source, values)
        device = device_of(cfg)
        precision = auto_precision(cfg) if cfg.trainer.precision == "auto" else cfg.trainer.precision
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"on {device_name() if device.type == 'cuda' else 'the CPU'}{threads}, precision {precision}", flush=True)
        print(f"{'resuming' if setting.run.resumed else 'run'} {setting.run.folder}", flush=True)
        record(setting.run, source)
        setting.metrics = MetricsFile(setting.run.folder / "metrics.csv")
        if cfg.logger.wandb is not None and not compared:
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
            "The first steps will say how long it takes; recipe.steps, recipe.batch_size and the sizes under encoder "
            "and backbone make it small",
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
    if setting.cfg.init_from and setting.cfg.compare:
        print("compared runs are left out: another net cannot start from init_from's weights", flush=True)
        return
    for name, extra in (setting.cfg.compare or {}).items():
        print(f"\ncompared run: {name} ({' '.join(extra)})", flush=True)
        folder = finished.folder / "compare" / name
        # What the run said of a part that is now another is not said of that one.
        changed = {g for g, _, o in (text.partition("=") for text in extra) if setting.run.choices.get(g, o) != o}
        others = ("paths.run_dir=", "resume=", "compare", *(f"{group}." for group in changed))
        overrides = [o for o in setting.run.overrides if not o.lstrip("+~").startswith(others)]
        try:
            cfg, choices = compose([*overrides, *extra, f"paths.run_dir='{folder}'", "compare=null"])
            result = train(cfg, choices, [*overrides, *extra], compared=True)
        except ConfigError as error:  # the run itself is trained and scored: its numbers are written all the same
            print(f"compared run {name} is left out: {error}", flush=True)
            continue
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
    run_folder = run_folder_of(folder)
    if run_folder is None:
        raise ConfigError(f"{folder} stands alone: there is no run.json above it that says which data it is scored on")
    head = read_json(run_folder / "run.json")
    cfg, stored = read_config(run_folder / "config.yaml"), read_config(run_folder / "config.yaml")
    changed = []
    try:
        today = resolved(compose(head["overrides"])[0])
        changed = differences(OmegaConf.to_container(stored), today)
        changed = [line for line in changed if not line.startswith(("paths.", "resume"))]
    except ConfigError as error:
        changed = [f"today's conf/ no longer composes this run: {error}"]
    state = stored_state(run_folder)
    use_recorded_options(cfg, state)
    for override in overrides:
        change(cfg, override, head["overrides"])
    check_node(without_missing(resolved(cfg)["dataset"]), "dataset")
    source = build(cfg.dataset)
    model, structure = load_checkpoint(folder)
    hand_over(source, state, overrides, model, structure)
    source.check()
    # What a class number means is in the spec; a language model may be asked about any data.
    if structure.spec["task"] == "seg" and (lines := other_data(structure, source.spec().to_dict())):
        raise ConfigError(
            f"{folder}: was trained on data that differ from those to score (checkpoint -> data):\n" + "\n".join(lines)
        )
    return model, source, cfg, changed


def read_config(file: Path) -> DictConfig:
    """A run's stored config.

    Raises:
        BadDataError: if it is not there or not YAML.
    """
    try:
        cfg = OmegaConf.create(file.read_text())
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise BadDataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(cfg, DictConfig):
        raise BadDataError(f"{file} is not a config")
    OmegaConf.set_struct(cfg, True)
    return cfg


def change(cfg: DictConfig, override: str, composed_from: list[str]) -> None:
    """Change one value of a stored config in place; every other value stays what it was.

    Args:
        cfg: the stored config.
        override: ``key.to.value=…``, or ``dataset=NAME`` for another data set as conf/ has it today.
        composed_from: the run's own overrides, which choose the numbers tuned for that data set.

    Raises:
        ConfigError: for a key that the stored config does not have.
    """
    key, _, text = override.partition("=")
    if key == "dataset":
        OmegaConf.set_struct(cfg, False)
        # What the run said of its own data set is not said of another.
        others = [text for text in composed_from if not text.lstrip("+~").startswith(("dataset=", "dataset."))]
        cfg.dataset = compose([*others, override])[0].dataset
        OmegaConf.set_struct(cfg, True)
        return
    if "." not in key:
        raise ConfigError(f"{override}: dataset=NAME or a value of the stored config (dataset.root=…) can be changed")
    set_value(cfg, key, text, "the stored config")


def set_value(cfg: DictConfig, key: str, text: str, name: str) -> None:
    """Set one value of a config, given as YAML; a key that ``name`` does not have is a ConfigError."""
    try:
        OmegaConf.update(cfg, key, OmegaConf.create(f"x: {text}").x)
    except OmegaConfBaseException as error:
        parent = OmegaConf.select(cfg, key.rpartition(".")[0])
        known = list(parent) if isinstance(parent, DictConfig) else []
        raise ConfigError(f"{name} has no key {key!r}{nearest(key.rpartition('.')[2], known)}") from error


def check_same_net(stored: Structure, wanted: Structure) -> None:
    """Raise ConfigError where a checkpoint's net is not the one this run describes, or its data has other classes."""
    lines = differences(stored.parts, wanted.parts)
    lines += other_data(stored, wanted.spec)
    if lines:
        shown = "\n".join(lines[:8]) + (f"\n… and {len(lines) - 8} more" if len(lines) > 8 else "")
        raise ConfigError(f"init_from: the checkpoint's net is not the one of this run (checkpoint -> run):\n{shown}")


def other_data(stored: Structure, spec: dict[str, Any]) -> list[str]:
    """Lines that say where a data set's spec is not what a checkpoint was trained on; empty where it fits."""
    fields = ("task", "spatial_dims", "in_channels", "num_classes", "class_names")
    return [
        line
        for name in fields
        for line in differences(_listed(stored.spec[name]), _listed(spec[name]), f"data: {name}")
    ]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def evaluate_checkpoint(options: Any, overrides: list[str]) -> dict[str, float]:
    """What tools/eval_model.py does: score a checkpoint, print the numbers, and write them beside the weights.

    Args:
        options: conf/eval.yaml with its arguments.
        overrides: changes to the run's stored config.
    """
    if options.split not in ("val", "test"):
        raise ConfigError(f"split={options.split}: a data set holds out val and test")
    ours = [text for text in overrides if not text.startswith("protocol.")]
    paths = [options.checkpoint]
    if options.checkpoint.startswith("["):
        from bestiary.shared.vision.ensemble import member_paths

        paths = member_paths(options.checkpoint)
    model, source, cfg, changed = load_run(paths[0], ours)
    if len(paths) > 1:
        model = _joined(model, source, paths, ours, options.split)
    refuse_trained_on(source, options.split, paths)
    protocol = [text for text in overrides if text not in ours]
    evaluations = asked_evaluations(options, cfg, protocol)
    for line in changed[:10]:
        print(f"differs from today's conf/ (the stored value is used): {line}", flush=True)
    debug = dict(cfg.get("debug") or {})
    model.to(pick_device(options.device))
    values = evaluate_all(model, source, evaluations, options.split, debug.get("max_held_out"))
    if not values:
        raise BadDataError(f"the {options.split} part of this data set is empty")
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.4f}")
    # Other numbers than the run's own get a file of their own.
    audio = None if options.audio == "real" else options.audio
    together = f"ensemble_of_{len(paths)}" if len(paths) > 1 else None
    part = options.part and options.part.replace("/", "-")
    names = [named_after(ours), options.protocol, part, named_after(protocol), audio, together]
    file = "_".join(["eval", options.split, *filter(None, names)])
    folders = [find_checkpoint(path) for path in paths]
    write_json(folders[0] / f"{file}.json", {**values, **({"members": [str(f) for f in folders]} if together else {})})
    return values


def _joined(first: nn.Module, source: Any, paths: list[str], overrides: list[str], split: str) -> nn.Module:
    """The ensemble of runs, scored on the first one's data if none of the others was trained on it."""
    from bestiary.shared.vision.ensemble import Ensemble, refuse_seen

    loaded = [load_run(path, overrides) for path in paths[1:]]
    model = Ensemble([first, *(member for member, *_ in loaded)], paths)  # type: ignore[list-item]
    refuse_seen(source.case_ids(split), [own for _, own, *_ in loaded], paths[1:])
    return model.eval()


def asked_evaluations(options: Any, cfg: DictConfig, changes: list[str]) -> dict[str, tuple[Any, str | None]]:
    """The run's own protocols, or the one that is asked for, on the audio that is asked for.

    Args:
        options: conf/eval.yaml with its arguments. cfg: the run's config. changes: ``protocol.key=value``, each.

    Raises:
        ConfigError: for a protocol, a key or a kind of audio that is not there.
    """
    if options.protocol is None:
        if options.part is not None or changes:
            raise ConfigError(f"{changes[0] if changes else 'part='} goes with protocol=NAME, and there is none")
        evaluations = read_evaluations(cfg)
    else:
        known = option_names("protocol")
        if options.protocol not in known:
            near = nearest(options.protocol, known)
            raise ConfigError(f"there is no protocol {options.protocol!r}{near}; there are: {', '.join(known)}")
        file = conf_dir() / "protocol" / f"{options.protocol}.yaml"
        node = OmegaConf.create({"protocol": OmegaConf.load(file)})
        OmegaConf.set_struct(node, True)
        for change_of in changes:
            key, _, text = change_of.partition("=")
            set_value(node, key, text, f"conf/protocol/{file.name}")
        evaluations = {options.protocol: (build(node)["protocol"], options.part)}
    if options.audio == "real":
        return evaluations
    controlled = {"_target_": "bestiary.shared.metrics.audio_controlled.AudioControlled", "audio": options.audio}
    return {name: (build({**controlled, "protocol": own}), part) for name, (own, part) in evaluations.items()}
