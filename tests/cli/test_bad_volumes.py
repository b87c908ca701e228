"""Data sets that cannot be trained on or planned: a clear answer for each kind of fault, and nothing lost."""

import gzip
import json
import shlex
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest
import yaml

from bestiary.shared.core.streams import Stream
from bestiary.shared.data.nnunet_folder import NnUNetFolder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return {"BESTIARY_DATA": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture
def copy(two_blocks, tmp_path):
    """A copy of the good set that a test may spoil."""
    return shutil.copytree(two_blocks.root, tmp_path / "set")


class Spoil:
    """Each kind of fault, done to case c1 of a copy."""

    def __init__(self, root, blocks, put):
        self.root, self.put, self.array, self.mask = root, put, blocks.image, blocks.label
        self.image, self.label = root / "imagesTr" / "c1_0000.nii.gz", root / "labelsTr" / "c1.nii.gz"

    def truncated(self):
        self.image.write_bytes(self.image.read_bytes()[: self.image.stat().st_size // 2])

    def truncated_plain(self):
        """Files without compression, one of them cut."""
        for path in self.root.rglob("*.nii.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        path = self.image.with_suffix("")
        path.write_bytes(path.read_bytes()[:-8])
        self.describe(file_ending=".nii")

    def text(self):
        self.image.write_text("hello, this is no volume")

    def empty_file(self):
        self.image.write_bytes(b"")

    def moved(self):
        self.put(self.label, self.mask, np.diag([1.0, 1, 3, 1]))

    def shape(self):
        self.put(self.image, self.array[:-1])

    def series(self):
        self.put(self.image, np.stack([self.array, self.array], -1))

    def colour(self):
        nib.save(nib.Nifti1Image(np.zeros(self.mask.shape, [(c, "u1") for c in "RGB"]), np.eye(4)), self.image)

    def complex(self):
        self.put(self.image, self.array.astype(np.complex64))

    def nan(self, case="c1"):
        self.put(self.image.with_name(f"{case}_0000.nii.gz"), np.where(self.mask > 0, np.nan, self.array))

    def infinite(self):
        self.put(self.image, np.where(self.mask > 0, np.inf, self.array))

    def zero_voxels(self):
        self.header(self.image, 80, "<f", 0.0)

    def label_range(self):
        self.put(self.label, self.mask * 3)

    def label_fraction(self):
        self.put(self.label, self.mask * np.float32(1.25))

    def all_empty(self):
        for path in self.label.parent.iterdir():
            self.put(path, self.mask * 0)

    def no_label(self):
        self.label.unlink()

    def no_image(self):
        self.image.unlink()

    def no_channel(self):
        self.describe(channel_names={"0": "MR", "1": "T2"})

    def folder(self):
        self.image.unlink()
        self.image.mkdir()

    def circle(self):
        self.image.unlink()
        self.image.symlink_to(self.image)

    def nowhere(self):
        self.label.unlink()
        self.label.symlink_to("nowhere.nii.gz")

    def twice(self):
        self.image.with_suffix("").write_bytes(gzip.decompress(self.image.read_bytes()))

    def train_and_test(self):
        shutil.copy(self.image, self.root / "imagesTs")
        shutil.copy(self.label, self.root / "labelsTs")

    def no_json(self):
        (self.root / "dataset.json").write_text("{nope")

    def regions(self):
        self.describe(labels={"background": 0, "whole": [1, 2], "spleen": 2})

    def ending(self):
        self.describe(file_ending=".mha")

    def folds(self):
        (self.root / "splits_final.json").write_text("[{")

    def leak(self):
        """A fold that trains on the test case."""
        lists = [{"train": ["c0", "c1", "t0"], "val": ["c2"]}]
        (self.root / "splits_final.json").write_text(json.dumps(lists))

    def describe(self, **changes):
        path = self.root / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def header(self, path, at, kind, value):
        """Overwrite a field of a header, and have the file placed by its voxel size alone."""
        raw = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<hh", raw, 252, 0, 0)
        struct.pack_into(kind, raw, at, value)
        path.write_bytes(gzip.compress(bytes(raw)))


IMAGE, LABEL = "imagesTr/c1_0000.nii.gz", "labelsTr/c1.nii.gz"
AT_START = {
    "truncated": [IMAGE, "cannot be read as NIfTI", "get the file again"],
    "truncated_plain": ["imagesTr/c1_0000.nii: cannot be read as NIfTI", "get the file again"],
    "text": [IMAGE, "not a gzip file", "get the file again"],
    "empty_file": [IMAGE, "Empty file", "get the file again"],
    "moved": [IMAGE, "voxel size (2, 1, 1) mm differs from (3, 1, 1) mm of c1.nii.gz", "Put both on one grid"],
    "shape": [IMAGE, "shape (8, 10, 11) differs from (8, 10, 12) of c1.nii.gz", "Put both on one grid"],
    "series": [IMAGE, "has 4 axes (12, 10, 8, 2), and 3 are needed", "one file for each channel"],
    "colour": [IMAGE, "(complex or colour)", "Give one real number a voxel"],
    "complex": [IMAGE, "complex64 (complex or colour)", "Give one real number a voxel"],
    "zero_voxels": [IMAGE, "voxel size of 0 mm", "Repair the header"],
    "label_range": [LABEL, "run from 0 to 6; allowed are whole numbers from 0 to 2", "Correct the file"],
    "label_fraction": [LABEL, "run from 0 to 2.5; allowed are whole numbers", "Correct the file"],
    "all_empty": ["labelsTr: no training case has a voxel of liver, spleen", "Correct the labels"],
    "no_label": [LABEL, "is missing for case c1", "Add it, or drop the case"],
    "no_image": [LABEL, "is a label without an image c1_0000.nii.gz", "dataset.split"],
    "no_channel": ["imagesTr/c1_0001.nii.gz: is missing for case c1", "Add it, or drop the case"],
    "folder": [IMAGE, "is a folder, and a NIfTI file is expected", "Put the file there"],
    "circle": [IMAGE, "is a link that leads nowhere, or in a circle", "Mend the link"],
    "nowhere": [LABEL, "is a link that leads nowhere, or in a circle", "Mend the link"],
    "twice": ["imagesTr/c1_0000: is there as .nii and as .nii.gz", "Keep one"],
    "train_and_test": ["imagesTs/c1: is a training case too", "Rename one"],
    "no_json": ["dataset.json: is not JSON", "Correct the file"],
    "regions": ["dataset.json", "region-based labels are not read", "Give each value a name"],
    "ending": ["dataset.json: file_ending '.mha' is not read", "convert the files to .nii.gz"],
    "folds": ["splits_final.json: cannot be read as JSON", "Correct it, or take it away"],
    "leak": ["case t0 is in train and again in test", "Keep it in one"],
}
"""What a run says of a fault before it begins."""


@pytest.mark.parametrize("kind", AT_START)
def test_a_run_does_not_begin(tool, short, copy, two_blocks, put, small_net, home, whole_tree, tmp_path, kind):
    getattr(Spoil(copy, two_blocks, put), kind)()
    before = whole_tree(copy)
    job = tool("train", *small_net, f"dataset.root={copy}", runs=tmp_path / "runs", env=home)
    text = short(job, *AT_START[kind])
    assert str(copy) in text
    assert whole_tree(copy) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"train": ["c0", "c9"], "test": ["t0"]}, ["names 1 cases that are not in imagesTr: c9", "give another split"]),
        ({"train": ["c0", "c1"], "test": ["c1"]}, ["case c1 is in train and again in test", "Keep it in one"]),
        ({"train": "c0", "test": ["t0"]}, ["split.json: must map train, val and test to lists of case ids"]),
    ],
    ids=["unknown", "overlap", "text"],
)
def test_a_bad_split(tool, short, two_blocks, small_net, home, tmp_path, split, words):
    (tmp_path / "split.json").write_text(json.dumps(split))
    arguments = [*small_net, f"dataset.root={two_blocks.root}", f"dataset.split={tmp_path / 'split.json'}"]
    short(tool("train", *arguments, runs=tmp_path / "runs", env=home), "split.json", *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("dataset.classes=[liver,lung]", ["lung", "liver, spleen"]),
        ("dataset.patch_size=[8,7,8]", ["patch_size (8, 7, 8) must be divisible"]),
        ("dataset.patch_size=[8,-8,8]", ["patch_size (8, -8, 8)", "1 or more"]),
        ("dataset.spacing=[-1,1,1]", ["spacing (-1.0, 1.0, 1.0) is in mm"]),
        (
            "dataset.spacing=[0.0001,0.0001,0.0001]",
            ["labelsTr/c1.nii.gz: resampling", "voxel size in the header right"],
        ),
        ("dataset.fold=first", ["dataset.fold=first: must be a whole number"]),
        ("dataset.split=a=b c.json", ["cannot be read", "'dataset.split='\"'\"'a=b c.json'\"'\"''"]),
    ],
)
def test_a_setting_that_does_not_fit_the_data(tool, short, two_blocks, small_net, home, tmp_path, argument, words):
    arguments = [*small_net, f"dataset.root={two_blocks.root}", argument]
    short(tool("train", *arguments, runs=tmp_path / "runs", env=home), *words)
    assert not (tmp_path / "runs").exists()


def test_what_may_not_be_read_or_written(tool, short, copy, small_net, home, as_others, tmp_path):
    image = copy / "imagesTr" / "c1_0000.nii.gz"
    image.chmod(0)
    arguments = [*small_net, f"dataset.root={copy}"]
    job = tool("train", *arguments, runs=tmp_path / "runs", env=home, before=as_others)
    short(job, "imagesTr/c1_0000.nii.gz: may not be read (Permission denied)", "Change its permissions", lines=1)
    image.chmod(0o644)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    job = tool("train", *arguments, f"paths.run_dir={closed / 'run'}", env=home, before=as_others)
    short(job, f"{closed / 'run'}: cannot be written (Permission denied)", "paths.run_dir", lines=1)
    # A plan goes into the folder of the data, or where it is told to.
    copy.chmod(0o555)
    job = tool("plan", f"dataset.root={copy}", env=home, before=as_others)
    short(job, f"{copy}: cannot be written (Permission denied)", "out=FILE", lines=1)
    job = tool("plan", f"dataset.root={copy}", f"out={tmp_path / 'p.yaml'}", env=home, before=as_others)
    assert job.returncode == 0, job.stderr
    assert f"dataset.plan={tmp_path / 'p.yaml'}" in job.stdout
    assert not (copy / "bestiary_plan.yaml").exists()
    copy.chmod(0o755)


def test_odd_volumes_are_trained_on(tool, copy, two_blocks, put, small_net, home, tmp_path):
    """Whole numbers stored as floats, an empty label, one slice, a few voxels, huge and negative voxel sizes."""
    spoil, cases = Spoil(copy, two_blocks, put), ("c0", "c1", "c2", "c3", "c4")
    files = {c: (spoil.image.with_name(f"{c}_0000.nii.gz"), spoil.label.with_name(f"{c}.nii.gz")) for c in cases}
    put(files["c0"][1], two_blocks.label.astype(np.float32))
    put(files["c1"][1], two_blocks.label * 0)
    for path, array in zip(files["c2"], (two_blocks.image, two_blocks.label), strict=True):
        put(path, array[..., 3:4].copy())
    for path, array in zip(files["c3"], (two_blocks.image, two_blocks.label), strict=True):
        put(path, array[:5, :5, :5].copy(), np.diag([1000.0, 1000, 1000, 1]))
    for path in files["c4"]:
        spoil.header(path, 80, "<f", -1.0)
    (copy / "imagesTr" / "._c0_0000.nii.gz").write_text("what a Mac leaves beside a file")
    run = tmp_path / "run"
    arguments = [*small_net, f"dataset.root={copy}", "dataset.spacing=[0,0,0]", "recipe.steps=4", "dataset.folds=2"]
    job = tool("train", *arguments, f"paths.run_dir={run}", env=home)
    assert job.returncode == 0, job.stderr
    assert "pixdim" not in job.stderr
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert all(0 <= value <= 1 for value in metrics.values())
    data = NnUNetFolder(copy, patch_size=(8, 8, 8), folds=2)
    assert sorted(data.case_ids("train") + data.case_ids("val")) == list(cases)
    assert data.case("c4").spacing == (2.0, 1.0, 1.0)
    assert data.case("c0").label.max() == 2


def test_a_begun_run_goes_on_after_a_bad_case_and_a_full_disk(
    tool, short, copy, two_blocks, put, small_net, home, full_disk, tmp_path
):
    order = [Stream(0, "train", 1).shuffled(k, 4) for k in range(4)]
    case = NnUNetFolder(copy, patch_size=(8, 8, 8)).case_ids("train")[order[2]]
    spoil = Spoil(copy, two_blocks, put)
    image = copy / "imagesTr" / f"{case}_0000.nii.gz"
    good = image.read_bytes()
    spoil.nan(case)  # which no header tells
    arguments = [*small_net, f"dataset.root={copy}", "recipe.steps=5", "recipe.batch_size=1"]
    arguments.append(f"paths.run_dir={tmp_path / 'run'}")
    last = tmp_path / "run" / "stages" / "train" / "last.ckpt"
    short(
        tool("train", *arguments, env=home),
        f"{case}_0000.nii.gz: holds NaN or infinite voxels",
        "Replace them",
        lines=1,
    )
    assert last.is_file()
    image.write_bytes(good)
    before = full_disk("lightning.fabric.plugins.io.torch_io", "_atomic_save", 2)
    job = tool("train", *arguments, env=home, before=before)
    short(job, "the disk is full", "last.ckpt", "make room", lines=1)
    assert f"note: files were changed since this run began, and are taken as they are now: {case}" in job.stdout
    assert last.is_file()
    done = tool("train", *arguments, env=home)
    assert done.returncode == 0, done.stderr
    assert "goes on from its last checkpoint" in done.stdout
    assert (tmp_path / "run" / "result.json").is_file()


# Plans


def test_a_plan_reports_every_fault_at_once(tool, copy, two_blocks, put, home, whole_tree):
    spoil = Spoil(copy, two_blocks, put)
    names = [f"d{n:02d}" for n in range(20)]
    kinds = ["truncated", "text", "empty_file", "moved", "shape", "series", "colour", "complex", "nan", "infinite",
             "zero_voxels", "label_range", "label_fraction", "no_label", "no_image", "folder", "circle", "nowhere",
             "twice", "train_and_test"]  # fmt: skip
    for case, kind in zip(names, kinds, strict=True):
        spoil.image = copy / "imagesTr" / f"{case}_0000.nii.gz"
        spoil.label = copy / "labelsTr" / f"{case}.nii.gz"
        put(spoil.image, two_blocks.image)
        put(spoil.label, two_blocks.label)
        spoil.nan(case) if kind == "nan" else getattr(spoil, kind)()
    (copy / "bestiary_plan.yaml").write_text("an older plan")
    before = whole_tree(copy)
    job = tool("plan", f"dataset.root={copy}", env=home)
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    lines = job.stderr.splitlines()
    assert "20 errors" in lines[0]
    assert lines[-1] == "nothing was written: mend the errors, and run this again"
    faults = [line for line in lines if line.startswith("  ")]
    for case, kind in zip(names, kinds, strict=True):
        assert any(case in line for line in faults), (case, kind)
    assert not any("/c0" in line for line in faults)
    assert whole_tree(copy) == before


def test_a_plan_that_cannot_be_made_or_written(tool, short, copy, two_blocks, put, home, full_disk, tmp_path):
    arguments = [f"dataset.root={copy}", f"out={tmp_path}"]
    short(tool("plan", *arguments, env=home), "is a folder", "Give a file in it", lines=1)
    (copy / "bestiary_plan.yaml").write_text("an older plan")
    before = full_disk("pathlib", "Path.write_text", 1)
    short(tool("plan", f"dataset.root={copy}", env=home, before=before), "the disk is full", "make room", lines=1)
    assert (copy / "bestiary_plan.yaml").read_text() == "an older plan"
    assert not list(copy.glob(".bestiary_plan*"))
    for path in copy.rglob("*.nii.gz"):
        put(path, (two_blocks.image if "images" in str(path) else two_blocks.label)[2:6, 2:6, 2:5].copy())
    # What is kept of volumes is a convenience: where it cannot be kept, nothing is lost.
    short(tool("plan", f"dataset.root={copy}", env={"BESTIARY_DATA": "/dev/null/x"}), str(copy), "too small", lines=1)


def test_a_name_with_spaces_commas_brackets_and_equals(tool, short, two_blocks, small_net, home, tmp_path):
    root = shutil.copytree(two_blocks.root, tmp_path / "мозг, [a=b] 脳")
    job = tool("plan", f"dataset.root={root}", env=home)
    assert job.returncode == 0, job.stderr
    command = next(line for line in job.stdout.splitlines() if "tools/train.py" in line)
    words = [word for word in shlex.split(command)[2:] if word.startswith("dataset.root=")]
    assert words == [f"dataset.root='{root}'"]
    # The command that is printed works; here as far as the first thing that is checked of the data.
    (root / "labelsTr" / "c3.nii.gz").unlink()
    job = tool("train", *small_net, *words, "dataset.plan=auto", runs=tmp_path / "runs", env=home)
    short(job, str(root / "labelsTr" / "c3.nii.gz"), "is missing", lines=1)
    short(tool("train", *small_net, f"dataset.root={root}", env=home), "quoted twice", shlex.quote(words[0]), lines=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channel_names": ["CT"]}, ["is a plan for the channels CT, and set has MR"]),
        ({"patch_size": [8, 9, 12]}, ["patch_size [8, 9, 12] must be divisible by"]),
        ({"patchsize": [8, 8, 8]}, ["has a key 'patchsize'", "did you mean 'patch_size'"]),
    ],
    ids=["other data", "patch", "unknown key"],
)
def test_a_plan_that_does_not_fit(tool, short, copy, small_net, home, tmp_path, change, words):
    level = {"spacing": [2, 1, 1], "patch_size": [8, 8, 12], "median_shape": [8, 10, 12], "batch_size": 2}
    level |= {"strides": [[1, 1, 1], [1, 2, 2]], "kernel_sizes": [[3, 3, 3]] * 2, "features": [4, 8]}
    level |= {"convs": [1, 1], "decoder_convs": [1], "residual": False, "batch_dice": False}
    plan = {"format": 1, "axes": "RAS", "channel_names": ["MR"], "normalization": [{"scheme": "zscore"}]}
    (plan if set(change) <= set(plan) else level).update(change)
    file = copy / "bestiary_plan.yaml"
    file.write_text(yaml.safe_dump({**plan, "configurations": {"3d_fullres": level}}))
    arguments = [*small_net, f"dataset.root={copy}", "dataset.plan=auto", "dataset.patch_size=null"]
    job = tool("train", *arguments, runs=tmp_path / "runs", env=home)
    short(job, str(file), *words, lines=1)
    assert not (tmp_path / "runs").exists()
