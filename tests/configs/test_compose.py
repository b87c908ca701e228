"""Every option composes with some project, every project composes, and which file wins."""

import itertools
import re

import pytest
from omegaconf import OmegaConf

from bestiary.shared.core.build import check_node
from bestiary.shared.core.checkpoint import Structure
from bestiary.shared.core.config import (
    check_choices,
    compose,
    conf_dir,
    config_hash,
    differences,
    options,
    resolved,
)
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.recipe import read_stages
from bestiary.shared.core.stages import module_class, read_evaluations
from bestiary.shared.core.train import change, without_missing

PROJECTS = options("project")
GROUPS = ("dataset", "backbone", "encoder", "recipe", "model", "trainer", "callbacks", "logger", "debug", "launcher")
PARTS = ("model", "encoder", "backbone", "dataset", "recipe", "trainer")


def check(overrides):
    """What train.py checks before it builds anything."""
    cfg, choices = compose(overrides)
    check_choices(cfg)
    values = resolved(cfg)
    for part in PARTS:
        check_node(without_missing(values.get(part)), part)
    module_class(cfg)
    read_stages(cfg)
    read_evaluations(cfg)
    return cfg, choices


@pytest.mark.parametrize("project", PROJECTS)
def test_every_project(project):
    cfg, choices = check([f"+project={project}"])
    assert cfg.project.name == project == choices["project"]
    assert cfg.recipe.run
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g, o in itertools.chain(*([(g, o) for o in options(g)] for g in GROUPS))]
)
def test_every_option_goes_with_some_project(group, option):
    failed = []
    for project in PROJECTS:
        try:
            _, choices = check([f"+project={project}", f"{group}={option}"])
            assert choices[group] == option
            return
        except Exception as error:
            failed.append(f"{project}: {error}")
    raise AssertionError("\n".join(failed))


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment(name):
    cfg, _ = check([f"+experiment={name}"])
    assert cfg.project.name == name.split("/")[0]


@pytest.mark.parametrize("project", PROJECTS)
def test_the_default_dataset_has_laptop_sizes(project):
    cfg, choices = compose([f"+project={project}"])
    file = conf_dir() / "tuned" / project / choices["recipe"] / f"{choices['dataset']}.yaml"
    assert file.is_file(), file
    sizes = OmegaConf.load(file).recipe
    # Every size that the recipe has as a knob, its stages' too.
    knobs = [key for key in cfg.recipe if re.search(r"(^|_)(steps|batch_size|prompts_per_step)$", key)]
    assert knobs
    assert [key for key in knobs if key not in sizes] == []


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_file_holds_no_number(project):
    """It is merged last, so a number in it would silently win."""
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "project" / f"{project}.yaml"))
    assert set(values) == {"defaults", "project"}
    assert set(values["project"]) == {"name", "module"}


@pytest.mark.parametrize("file", sorted((conf_dir() / "experiment").rglob("*.yaml")), ids=lambda f: f.stem)
def test_an_experiment_writes_nothing_that_debug_must_beat(file):
    assert not {"trainer", "callbacks", "logger", "debug", "project"} & set(OmegaConf.load(file))


# ------------------------------------------------------------------ which file wins


def of(folder, project, *path):
    return OmegaConf.load(conf_dir().joinpath(folder, project, *path).with_suffix(".yaml"))


def test_paper_beats_recipe():
    method = OmegaConf.load(conf_dir() / "recipe" / "segmentation.yaml")
    paper = of("paper", "asm_unet", "segmentation").recipe
    cfg, _ = compose(["+project=asm_unet", "dataset=nnunet_folder"])  # there are no tuned numbers for it
    told = {k: v for k, v in paper.items() if k != "stages"}
    assert {k: cfg.recipe[k] for k in told} == told
    assert any(method.get(k) != v for k, v in told.items())


def test_tuned_beats_paper_and_the_command_line_beats_all():
    paper = of("paper", "asm_unet", "segmentation").recipe
    tuned = of("tuned", "asm_unet", "segmentation", "icbm152").recipe
    assert paper.steps != tuned.steps
    cfg, _ = compose(["+project=asm_unet"])
    assert cfg.recipe.steps == cfg.recipe.stages.train.steps == tuned.steps
    # What tuned does not mention stays the paper's.
    left = [k for k in paper if k not in tuned and k != "stages"]
    assert left
    assert all(cfg.recipe[k] == paper[k] for k in left)
    cfg, _ = compose(["+project=asm_unet", "recipe.steps=7"])
    assert cfg.recipe.stages.train.steps == 7


def test_tuned_beats_the_recipe_of_the_tutorial():
    cfg, _ = compose(["+project=_examples"])
    assert OmegaConf.load(conf_dir() / "recipe" / "text_then_chat.yaml").steps == 2000
    assert read_stages(cfg)["text"].steps == cfg.recipe.steps == 400


def test_an_experiment_beats_tuned_and_debug_beats_an_experiment():
    tuned = of("tuned", "asm_unet", "segmentation", "icbm152")
    cfg, _ = compose(["+experiment=asm_unet/raster_icbm152"])
    assert cfg.compare is None
    assert tuned.compare is not None
    cfg, _ = compose(["+experiment=asm_unet/raster_icbm152", "debug=fast", "recipe.steps=1000"])
    fast = OmegaConf.load(conf_dir() / "debug" / "fast.yaml")
    for stage in read_stages(cfg).values():
        assert stage.steps == fast.max_steps
        assert stage.batch_size == fast.max_batch
    # It caps: what is smaller already stays.
    cfg, _ = compose(["+project=_examples", "debug=fast", "recipe.steps=2", "recipe.batch_size=1"])
    assert (read_stages(cfg)["text"].steps, read_stages(cfg)["text"].batch_size) == (2, 1)


# ------------------------------------------------------------------ compose() and its data


def test_compose_twice_is_the_same_and_leaves_hydra_alone():
    from hydra.core.global_hydra import GlobalHydra

    one, two = compose(["+project=_examples"]), compose(["+project=_examples"])
    assert one == two
    assert not GlobalHydra.instance().is_initialized()
    assert "hydra" not in one[0]
    assert OmegaConf.is_struct(one[0])
    with pytest.raises(ConfigError):
        compose(["+project=_exampels"])
    assert not GlobalHydra.instance().is_initialized()


def test_the_hash_is_of_what_a_number_depends_on():
    def identity(*extra):
        return config_hash(resolved(compose(["+project=_examples", *extra])[0]))

    assert identity() == identity()
    for same in ("paths.run_dir=/x", "resume=never", "logger=wandb"):
        assert identity(same) == identity()
    for other in (
        "seed=1",
        "recipe.lr=2",
        "dataset.window=9",
        "debug=fast",
        "init_from=/x",
        "backbone.config.hidden_size=8",
    ):
        assert identity(other) != identity()


def test_differences():
    stored = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": {"x": 1}}
    now = {"a": 1, "b": {"c": [1, 3], "d": 0}, "new": 5}
    assert differences(stored, now) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d: None -> 0",
        "gone: {'x': 1} -> None",
        "new: None -> 5",
    ]
    assert differences(stored, stored) == []


def test_every_target_is_one_that_may_be_named():
    """A structure of each project passes the checks of a command line."""
    for project in PROJECTS:
        cfg, choices = compose([f"+project={project}"])
        values = resolved(cfg)
        parts = {name: values.get(name) for name in ("model", "encoder", "backbone")}
        check_node(Structure(project, choices, [], {}, parts).parts)


def test_a_run_on_ones_own_data_is_scored_on_another_data_set():
    """What the run said of its own data set has no place in the other's config."""
    said = ["+project=music_flamingo", "dataset=audio_qa_jsonl", "dataset.path=mine.jsonl", "recipe.steps=7"]
    cfg, _ = compose(said)
    change(cfg, "dataset=gtzan", said)
    assert cfg.dataset._target_.endswith("GTZAN")
    assert "path" not in cfg.dataset
    change(cfg, "dataset.root=there", said)
    assert cfg.dataset.root == "there"
    assert cfg.recipe.steps == 7
