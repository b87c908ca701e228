"""Bad images, masks and checkpoints for predict, eval_model, import_nnunet: a clear answer each, and nothing lost."""

import gzip
import json
import os
import pickle
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return {"BESTIARY_DATA": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def run(tool, two_blocks, small_net, home, tmp_path_factory):
    """A run of one step on the good set."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    job = tool("train", *small_net, f"dataset.root={two_blocks.root}", f"paths.run_dir={folder}", env=home)
    assert job.returncode == 0, job.stderr
    return folder


def with_voxels(path, *sizes):
    """A copy of a file's bytes with other voxel sizes in its header, which alone place it."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<3f", raw, 80, *sizes)
    struct.pack_into("<hh", raw, 252, 0, 0)
    return gzip.compress(bytes(raw))


def test_a_folder_of_bad_images_costs_the_good_ones_nothing(tool, run, two_blocks, put, as_others, tmp_path):
    inputs, image = tmp_path / "in", two_blocks.image
    good = ["мозг", "脳 1", "a,b", "[x]", "k=v"]
    for name in good:
        put(inputs / f"{name}.nii.gz", image)
    whole = (inputs / "k=v.nii.gz").read_bytes()
    bad = {
        "cut": "get the file again",
        "text": "get the file again",
        "nothing": "get the file again",
        "series": "has 4 axes (12, 10, 8, 2), and 3 are needed",
        "flat": "has 2 axes (12, 10), and 3 are needed",
        "nan": "Replace them before use",
        "colour": "Give one real number a voxel",
        "complex": "Give one real number a voxel",
        "folder": "is a folder",
        "circle": "Mend the link",
        "zero": "voxel size of 0 mm",
        "huge": "Is the voxel size in the header right?",
        "closed": "Change its permissions",
        "two_0000": "two_0001.nii.gz lies beside it, and this model takes 1 channel",
    }
    path = {name: inputs / f"{name}.nii.gz" for name in bad}
    path["cut"].write_bytes(whole[: len(whole) // 2])
    path["text"].write_text("hello, no volume")
    path["nothing"].write_bytes(b"")
    put(path["series"], np.stack([image, image], -1))
    put(path["flat"], image[..., 0])
    put(path["nan"], np.where(image > 60, np.nan, image))
    nib.save(nib.Nifti1Image(np.zeros(image.shape, [(c, "u1") for c in "RGB"]), np.eye(4)), path["colour"])
    put(path["complex"], image.astype(np.complex64))
    path["folder"].mkdir()
    path["circle"].symlink_to(path["circle"])
    path["zero"].write_bytes(with_voxels(inputs / "k=v.nii.gz", 0.0, 1.0, 2.0))
    put(path["huge"], image, np.diag([1000.0, 1000, 1000, 1]))
    put(path["closed"], image)
    path["closed"].chmod(0)
    for channel in range(2):
        put(inputs / f"two_000{channel}.nii.gz", image)
    arguments = [f"checkpoint={run}", "inputs=in", "out=out"]
    job = tool("predict", *arguments, cwd=tmp_path, before=as_others)
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    report = job.stderr.partition(f"{len(bad)} of {len(bad) + len(good)} images were not predicted:")[2].splitlines()[
        1:
    ]
    assert len(report) == len(bad)
    for name, words in bad.items():
        assert any(f"in/{name}.nii.gz: " in line and words in line for line in report), (name, report)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("*_seg.nii.gz")) == sorted(f"{name}_seg.nii.gz" for name in good)
    kept = {p: p.read_bytes() for p in out.iterdir()}
    # Mended, the rest follows, and what is there stays.
    for name in bad:
        path[name].rmdir() if name == "folder" else path[name].unlink()
    (inputs / "two_0001.nii.gz").unlink()
    (inputs / "cut.nii.gz").write_bytes(whole)
    # A voxel size below 0 is what it is without the sign; one slice, and one voxel, are volumes too.
    (inputs / "minus.nii.gz").write_bytes(with_voxels(inputs / "k=v.nii.gz", -1.0, 1.0, 2.0))
    put(inputs / "slice.nii.gz", image[..., :1].copy())
    put(inputs / "voxel.nii.gz", image[:1, :1, :1].copy())
    job = tool("predict", *arguments, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert "pixdim" not in job.stderr
    assert job.stderr.count("done before") == len(good)
    assert all(p.read_bytes() == data for p, data in kept.items() if p.name != "volumes.csv")
    assert nib.load(out / "voxel_seg.nii.gz").shape == (1, 1, 1)
    assert nib.load(out / "minus_seg.nii.gz").header.get_zooms() == (1.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("inputs=notes", ["notes: holds no .nii.gz or .nii file", "Give the folder"]),
        ("inputs=notes/a.txt", ["a.txt: is not named like a NIfTI file", "Convert it first"]),
        ("inputs=twins", ["would both be written to a_seg.nii.gz", "rename one"]),
        ("inputs=out", ["out: is read and written at once", "out=…"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_inputs_that_are_none(tool, short, run, two_blocks, put, tmp_path, inputs, words):
    for folder in ("notes", "out"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("x")
    for name in ("a.nii", "a.nii.gz"):
        put(tmp_path / "twins" / name, two_blocks.image)
    short(tool("predict", f"checkpoint={run}", inputs, "out=out", cwd=tmp_path), *words, lines=1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_a_full_disk_and_a_closed_folder(tool, short, run, two_blocks, put, full_disk, as_others, tmp_path):
    for name in ("a", "b"):
        put(tmp_path / "in" / f"{name}.nii.gz", two_blocks.image)
    arguments = [f"checkpoint={run}", "inputs=in,in/a.nii.gz", "out=out"]  # the same file twice is one
    before = full_disk("bestiary.shared.data.preprocess", "write_label", 2)
    job = tool("predict", *arguments, cwd=tmp_path, before=before)
    short(job, "the disk is full", "what was finished is kept", lines=2)
    first = (tmp_path / "out" / "a_seg.nii.gz").read_bytes()
    job = tool("predict", *arguments, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert job.stderr.count("done before") == 1
    assert (tmp_path / "out" / "a_seg.nii.gz").read_bytes() == first
    assert (tmp_path / "out" / "b_seg.nii.gz").is_file()
    (tmp_path / "closed").mkdir(mode=0o555)
    job = tool("predict", f"checkpoint={run}", "inputs=in", "out=closed", cwd=tmp_path, before=as_others)
    short(job, "closed: cannot be written (Permission denied)", "out=…", lines=1)


# Checkpoints


def edit(folder, change):
    file = folder / "structure.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: edit(c, lambda s: s["spec"].update(in_channels=2, modalities=["MR", "T2"])), ["does not fit"]),
        (lambda c: edit(c, lambda s: s["spec"].update(num_classes=2, class_names=["b", "a"])), ["does not fit"]),
        (lambda c: edit(c, lambda s: s["spec"].update(patch_size=["a", 8, 8])), ["structure.json was written by"]),
        (lambda c: edit(c, lambda s: s.update(spec={}, parts=None)), ["structure.json was written by another"]),
        (lambda c: edit(c, lambda s: s["parts"]["model"].update(_target_="os.system")), ["'os.system' is not allowed"]),
        (lambda c: (c / "structure.json").write_text("{"), ["structure.json cannot be read"]),
        (lambda c: (c / "weights.safetensors").write_bytes(b"half"), ["weights.safetensors does not fit", "damaged"]),
    ],
    ids=["channels", "classes", "patch", "no spec", "target", "no JSON", "cut"],
)
def test_a_checkpoint_that_is_none(tool, short, run, two_blocks, put, tmp_path, spoil, words):
    folder = shutil.copytree(run / "stages" / "train", tmp_path / "checkpoint")
    spoil(folder)
    put(tmp_path / "a.nii.gz", two_blocks.image)
    job = tool("predict", f"checkpoint={folder}", f"inputs={tmp_path / 'a.nii.gz'}", f"out={tmp_path / 'out'}")
    short(job, str(folder), *words, lines=1)
    assert not (tmp_path / "out").exists()


def test_other_classes_make_no_ensemble_and_no_score(tool, short, run, two_blocks, put, home, tmp_path):
    other = shutil.copytree(run / "stages" / "train", tmp_path / "other")
    edit(other, lambda s: s["spec"].update(class_names=["background", "spleen", "liver"]))
    put(tmp_path / "a.nii.gz", two_blocks.image)
    arguments = [f"inputs={tmp_path / 'a.nii.gz'}", f"out={tmp_path / 'out'}"]
    job = tool("predict", f"checkpoint=[{run},{other}]", *arguments)
    short(job, "differ in classes, and make no ensemble", lines=1)
    assert not (tmp_path / "out").exists()
    # The numbers of a model must mean what those of the labels mean.
    root = shutil.copytree(two_blocks.root, tmp_path / "swapped")
    values = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**values, "labels": {"background": 0, "spleen": 1, "liver": 2}}))
    stored = {p: p.read_bytes() for p in run.rglob("*.json")}
    job = tool("eval_model", f"checkpoint={run}", f"dataset.root={root}", env=home)
    short(job, "was trained on data that differ", "data: class_names", "liver", lines=3)
    (root / "dataset.json").write_text(json.dumps({**values, "channel_names": {"0": "MR", "1": "T2"}}))
    for image in list(root.rglob("*_0000.nii.gz")):
        shutil.copy(image, str(image).replace("_0000", "_0001"))
    job = tool("eval_model", f"checkpoint={run}", f"dataset.root={root}", env=home)
    short(job, "data: in_channels: 1 -> 2", lines=3)
    assert {p: p.read_bytes() for p in run.rglob("*.json")} == stored


# Masks against references


@pytest.fixture
def masks(two_blocks, put, tmp_path):
    """Predictions and references of the cases a to h, and scores from before."""
    for case in "abcdefgh":
        for folder in ("predictions", "labels"):
            put(tmp_path / folder / f"{case}.nii.gz", two_blocks.label)
    (tmp_path / "predictions" / "scores.csv").write_text("scores from before")
    return tmp_path


def scored(tool, folder, *arguments, **options):
    fast = ["hd95=false", "nsd=false"]
    given = [f"predictions={folder / 'predictions'}", f"labels={folder / 'labels'}", *fast, *arguments]
    return tool("eval_model", *given, **options)


def test_masks_that_cannot_be_scored_are_reported_at_once(tool, masks, two_blocks, put):
    label, path = two_blocks.label, {case: masks / "predictions" / f"{case}.nii.gz" for case in "abcdefgh"}
    put(path["a"], label[:-1])
    put(path["b"], label, np.eye(4))
    put(path["c"], label * 3)
    put(path["d"], label * np.float32(1.25))
    put(path["e"], np.where(label > 0, np.nan, 0))
    put(path["f"], np.stack([label, label], -1))
    path["g"].write_bytes(path["g"].read_bytes()[:60])
    words = {"a": "shape", "b": "voxel size (", "c": "has the values 3, 6, which are no class",
             "d": "no whole numbers", "e": "NaN", "f": "has 4 axes", "g": "cannot be read as NIfTI"}  # fmt: skip
    job = scored(tool, masks)
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    lines = job.stderr.strip().splitlines()
    assert "7 of 8 cases cannot be scored" in lines[0]
    assert len(lines) == 8
    for case, what in words.items():
        assert any(f"{path[case]}: " in line and what in line for line in lines), (case, lines)
    assert (masks / "predictions" / "scores.csv").read_text() == "scores from before"


def spoil_reference(folder, label, put, kind):
    path = folder / "labels" / "b.nii.gz"
    describe = {
        "same value": {"background": 0, "liver": 1, "spleen": 1},
        "no background": {"liver": 1, "spleen": 2},
        "regions": {"background": 0, "liver": [1, 2]},
    }
    if kind in describe:
        (folder / "dataset.json").write_text(json.dumps({"labels": describe[kind]}))
    elif kind == "no JSON":
        (folder / "dataset.json").write_text("{")
    elif kind == "link":
        path.unlink()
        path.symlink_to(path)
    elif kind == "huge":
        put(path, label.astype(np.int32) * 40000)
    elif kind == "no prediction":
        (folder / "predictions" / "b.nii.gz").unlink()
    elif kind == "two":
        put(folder / "predictions" / "b.nii", label)
    elif kind == "all empty":
        for reference in (folder / "labels").iterdir():
            put(reference, label * 0)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("link", [], ["labels/b.nii.gz: is a link that leads nowhere", "Mend the link"]),
        ("huge", [], ["labels/b.nii.gz: has the value 80000", "Give dataset_json="]),
        ("no prediction", [], ["1 of 8 references have no prediction", "b"]),
        ("two", [], ["b.nii and b.nii.gz are both of case b", "Keep one"]),
        ("all empty", [], ["every reference is empty: there is nothing to score"]),
        ("same value", [], ["dataset.json: labels must name the background", "each value once"]),
        ("no background", [], ["dataset.json: labels must name the background, which is 0"]),
        ("regions", [], ["dataset.json: labels must map two names or more to one number each"]),
        ("no JSON", [], ["dataset.json: is not JSON", "Correct the file"]),
        ("", ["classes=a,a"], ["classes=a,a", "each once"]),
        ("", ["nsd_tolerance_mm=nan"], ["nsd_tolerance_mm must be 0 or more"]),
        ("", ["out=/dev/null/x"], ["/dev/null/x: cannot be written (Not a directory)", "out=…"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) == 1 and "=" in value[0] else None,
)
def test_references_that_cannot_be_scored(tool, short, masks, two_blocks, put, kind, arguments, words):
    spoil_reference(masks, two_blocks.label, put, kind)
    short(scored(tool, masks, *arguments), *words)
    assert (masks / "predictions" / "scores.csv").read_text() == "scores from before"


def test_empty_masks_and_floats_have_their_scores(tool, masks, two_blocks, put):
    """By nnU-Net's rule: absent from both is no score, absent from one is 0; 2.0 is 2."""
    for folder, case in (("labels", "a"), ("predictions", "b"), ("labels", "c"), ("predictions", "c")):
        put(masks / folder / f"{case}.nii.gz", two_blocks.label * 0)
    put(masks / "predictions" / "d.nii.gz", two_blocks.label.astype(np.float32))
    (masks / "predictions" / "._d.nii.gz").write_text("what a Mac leaves beside a file")
    job = scored(tool, masks)
    assert job.returncode == 0, job.stderr
    found = json.loads((masks / "predictions" / "scores.json").read_text())["metrics"]
    assert found["dice/1"] == pytest.approx(5 / 7)  # 1 of five, 0 of two, and none of one
    rows = (masks / "predictions" / "scores.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows if row.startswith(("a,1", "b,1", "c,1", "d,1"))] == [
        "0.0",
        "0.0",
        "nan",
        "1.0",
    ]


# nnU-Net's checkpoints


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", ["cannot be read as a checkpoint", "get the file again"]),
        ("empty", ["cannot be read as a checkpoint", "get the file again"]),
        ("cut", ["cannot be read as a checkpoint", "get the file again"]),
        ("other", ["is no checkpoint of nnU-Net v2: it has no init_args", "Give a checkpoint_final.pth"]),
        ("code", ["holds more than tensors", "mkdir", "is not loaded"]),
        ("pickle", ["holds more than tensors", "is not loaded"]),
    ],
)
def test_a_file_that_is_no_model_of_nnunet(tool, short, tmp_path, kind, words):
    file, ran = tmp_path / "c.pth", tmp_path / "ran"
    if kind == "text":
        file.write_text("hello")
    elif kind == "code":
        torch.save({"network_weights": {}, "init_args": Touch(ran)}, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Touch(ran)))
    else:
        torch.save({"a.weight": torch.zeros(999)}, file)
        file.write_bytes(file.read_bytes()[: {"empty": 0, "cut": 999}.get(kind, 99999)])
    short(tool("import_nnunet", f"checkpoint={file}", f"out={tmp_path / 'out'}"), str(file), *words, lines=1)
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
