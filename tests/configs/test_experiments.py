"""conf/experiment/: each file composes, says what it is, keeps to its own ground, and is of the size it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bestiary.shared.core.build import build, check_node
from bestiary.shared.core.checkpoint import Structure, build_model
from bestiary.shared.core.config import check_choices, compose, conf_dir, resolved
from bestiary.shared.data.audio_qa import PARTS

yaml = pytest.importorskip("yaml")

FOLDER = conf_dir() / "experiment"
NAMES = sorted(p.relative_to(FOLDER).with_suffix("").as_posix() for p in FOLDER.rglob("*.yaml"))
# What the command line and debug/ decide, and an experiment, which is merged after them, would override.
NOT_ITS_OWN = {"trainer", "callbacks", "logger", "debug"}


def broken_rules(path: Path) -> list[str]:
    """What an experiment file does that it may not."""
    lines = path.read_text(encoding="utf-8").splitlines()
    body = yaml.safe_load("\n".join(lines))
    defaults = body.get("defaults") or [{}]
    name = path.relative_to(path.parents[1]).with_suffix("").as_posix()
    found = []
    if lines[0] != "# @package _global_":
        found.append("does not begin with # @package _global_")
    if f"+experiment={name}" not in lines[1]:
        found.append(f"its second line is not a description with the command +experiment={name}")
    # A variant begins with the experiment that it changes, one of its own project.
    siblings = [f"{path.parent.name}/{p.stem}" for p in path.parent.glob("*.yaml") if p != path]
    if defaults[0] != {"/project": path.parent.name} and defaults[0] not in siblings:
        found.append(f"defaults begin neither with /project: {path.parent.name} nor with an experiment of it")
    if defaults[-1] != "_self_":
        found.append("defaults do not end with _self_: the groups would beat its own numbers")
    groups = {key.removeprefix("override").strip().strip("/") for o in defaults if isinstance(o, dict) for key in o}
    return found + [f"writes under {key}" for key in sorted(NOT_ITS_OWN & (set(body) | groups))]


def parameters(name: str, *overrides: str) -> int:
    """Parameters of an experiment's model, on the meta device; no data is read."""
    cfg, choices = compose([f"+experiment={name}", *overrides])
    spec = build(cfg.dataset).spec()
    parts = {part: resolved(cfg)[part] or None for part in ("model", "encoder", "backbone")}
    with torch.device("meta"):
        model = build_model(Structure(cfg.project.name, choices, [], spec.to_dict(), parts))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_into_a_runnable_whole(name):
    cfg, choices = compose([f"+experiment={name}"])
    check_choices(cfg)
    assert cfg.project.name == choices["project"] == name.split("/")[0]
    values = resolved(cfg)
    for part in ("model", "encoder", "backbone", "dataset", "recipe", "trainer"):
        check_node(values[part], part)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_to_the_rules(name):
    assert broken_rules(FOLDER / f"{name}.yaml") == []


def test_a_planted_violation_is_caught(tmp_path):
    path = tmp_path / "alpha" / "row.yaml"
    path.parent.mkdir()
    path.write_text("# a row\ndefaults:\n  - override /trainer: cpu\nlogger: {wandb: null}\n")
    assert len(broken_rules(path)) == 6


def test_a_variant_changes_an_experiment_of_its_own_project(tmp_path):
    for name, base in (("alpha/row", None), ("beta/row", None), ("alpha/good", "alpha/row"), ("alpha/bad", "beta/row")):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        first = f"/project: {path.parent.name}" if base is None else base
        path.write_text(f"# @package _global_\n# +experiment={name}\ndefaults:\n  - {first}\n  - _self_\n")
    assert broken_rules(tmp_path / "alpha" / "row.yaml") == broken_rules(tmp_path / "alpha" / "good.yaml") == []
    assert len(broken_rules(tmp_path / "alpha" / "bad.yaml")) == 1


@pytest.mark.parametrize(
    ("name", "official", "never_used"),
    [
        ("asm_unet/paper_synapse", 38_488_737, 756_512),
        ("asm_unet/paper_synapse_enc_dec", 43_541_328, 1_263_928),
        ("asm_unet/paper_synapse_plain", 30_709_133, 0),
    ],
)
def test_the_paper_sizes_are_the_official_codes(name, official, never_used):
    """9 classes; the official code also builds parameters that it never uses, and we do not."""
    assert parameters(name) == official - never_used


def test_music_flamingo_is_of_the_released_checkpoints_size():
    # Its table of positions, 1500 of 1280, is a buffer here; a tokenizer of bytes adds its tokens inside the table.
    found = parameters("music_flamingo/paper_audio_grpo", "dataset.path=x.jsonl")
    assert found + 1500 * 1280 == 8_267_215_360


def test_music_flamingo_trains_at_the_papers_numbers():
    cfg, choices = compose(["+experiment=music_flamingo/paper_audio_grpo"])
    recipe = cfg.recipe
    assert (recipe.sft_lr, recipe.cold_lr, recipe.lr, recipe.samples_per_prompt) == (1.5e-5, 1e-5, 1e-6, 5)
    assert list(recipe.run) == ["sft", "cold_start", "grpo"]
    cfg, choices = compose(["+experiment=music_flamingo/paper_af3_sft"])
    assert choices["recipe"] == "af3_sft"
    assert (cfg.recipe.lr, cfg.recipe.batch_size, cfg.model.rotary_time) == (1.5e-5, 128, None)


def test_experiments_on_a_users_questions_ask_for_parts_that_it_has():
    found = 0
    for name in NAMES:
        cfg, choices = compose([f"+experiment={name}"])
        if choices["dataset"] != "audio_qa_jsonl":
            continue
        found += 1
        asked = [node.get("part") for node in cfg.recipe.evaluations.values() if node]
        for stage in (cfg.recipe.stages[stage] for stage in cfg.recipe.run):
            asked += [entry.get("part") for entry in (stage.get("blend") or {}).values() if not entry.get("dataset")]
            asked += [] if stage.get("blend") else [(stage.get("data") or {}).get("part")]
        assert set(asked) <= set(PARTS), name
    assert found >= 2


def test_paper_sizes_train_at_the_papers_numbers():
    cfg, _ = compose(["+experiment=asm_unet/paper_synapse"])
    assert (cfg.recipe.steps, cfg.recipe.batch_size, cfg.recipe.optimizer) == (250_000, 4, "sgd")
    assert (list(cfg.dataset.patch_size), cfg.model.mirror_tta, cfg.model.sw_overlap) == ([48, 192, 192], True, 0.5)


def test_the_laptop_rows_differ_in_what_they_name_alone():
    default = resolved(compose(["+project=asm_unet"])[0])
    decoder = resolved(compose(["+experiment=asm_unet/enc_dec_icbm152"])[0])
    raster = resolved(compose(["+experiment=asm_unet/raster_icbm152"])[0])
    for row in (default, decoder, raster):
        row.pop("compare")
    assert default | {"backbone": raster["backbone"]} == raster
    assert default["model"]["network"].pop("asm_in_decoder") is False
    assert decoder["model"]["network"].pop("asm_in_decoder") is True
    assert default == decoder
