"""Stopping and starting again: what is finished is kept, and nothing is mistaken for it."""

import os

import nibabel as nib
import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import UserError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.vision import predict_files as module


def test_a_stop_loses_at_most_the_case_at_hand(tmp_path, monkeypatch, make, write, labels, small):
    for name in "abc":
        write(tmp_path / "in" / f"{name}.nii.gz", small(ord(name)))
    want = make().predict([tmp_path / "in"], tmp_path / "want")
    real, calls = pre.write_label, []

    def stopped(path, *arguments, **options):
        calls.append(path)
        real(path, *arguments, **options)
        if len(calls) == 2:
            raise KeyboardInterrupt  # after b's picture and volumes, and before its label has its name
        return path

    monkeypatch.setattr(module.pre, "write_label", stopped)
    with pytest.raises(KeyboardInterrupt):
        make().predict([tmp_path / "in"], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*_seg*")] == ["a_seg.nii.gz"]
    # Half a line, as a full disk or a power cut may leave it.
    table = tmp_path / "out" / "volumes.csv"
    table.write_text(table.read_text() + "b,1,ris")
    monkeypatch.setattr(module.pre, "write_label", real)
    lines = []
    module.predict_files(make(), [tmp_path / "in"], tmp_path / "out", say=lines.append)
    assert [("done before" in line) for line in lines] == [True, False, False]
    assert table.read_text() == want[-1].read_text()
    for name in "abc":
        np.testing.assert_array_equal(
            labels(tmp_path / "out" / f"{name}_seg.nii.gz"), labels(tmp_path / "want" / f"{name}_seg.nii.gz")
        )


def test_what_is_finished_is_repeated_only_if_asked(tmp_path, make, write, small):
    path = write(tmp_path / "a.nii.gz", small())
    first = make().predict([path], tmp_path / "out")[0]
    time = first.stat().st_mtime_ns
    assert make().predict([path], tmp_path / "out") == []
    assert first.stat().st_mtime_ns == time
    # The table was thrown away: it comes back from the label.
    table = tmp_path / "out" / "volumes.csv"
    text = table.read_text()
    table.unlink()
    assert make().predict([path], tmp_path / "out") == [table]
    assert table.read_text() == text
    # overwrite=true is for what another model made: a stopped call with it goes on as any other.
    assert make().predict([path], tmp_path / "out", overwrite=True) == []
    assert first.stat().st_mtime_ns == time
    first.unlink()
    assert len(make().predict([path], tmp_path / "out")) == 2
    assert table.read_text() == text


def test_a_stopped_overwrite_goes_on(tmp_path, monkeypatch, make, write, small):
    for name in "abc":
        write(tmp_path / "in" / f"{name}.nii.gz", small(ord(name)))
    old, new = make(), make("LPS")
    old.predict([tmp_path / "in"], tmp_path / "out")
    with monkeypatch.context() as patch:
        real = pre.write_label

        def stopped(path, *arguments, **options):
            if "b_seg" in path.name:
                raise KeyboardInterrupt
            return real(path, *arguments, **options)

        patch.setattr(module.pre, "write_label", stopped)
        with pytest.raises(KeyboardInterrupt):
            new.predict([tmp_path / "in"], tmp_path / "out", overwrite=True)
    written = new.predict([tmp_path / "in"], tmp_path / "out", overwrite=True)
    assert [p.name for p in written if "seg" in p.name] == ["b_seg.nii.gz", "c_seg.nii.gz"]


def test_a_table_of_another_model_is_mended(tmp_path, make, write, small):
    """A stop between table and label leaves the lines of one model beside the label of another."""
    path, table = write(tmp_path / "a.nii.gz", small()), tmp_path / "out" / "volumes.csv"
    make("LPS").predict([path], tmp_path / "other")
    make().predict([path], tmp_path / "out")
    text = table.read_text()
    table.write_text((tmp_path / "other" / "volumes.csv").read_text())
    assert table.read_text() != text
    assert make().predict([path], tmp_path / "out") == [table]
    assert table.read_text() == text


def test_a_label_that_is_cut_short_is_made_again(tmp_path, make, write, labels):
    rough = np.random.default_rng(0).normal(size=(40, 40, 40))
    path = write(tmp_path / "a.nii.gz", rough)
    label = make().predict([path], tmp_path / "out")[0]
    whole = labels(label)
    label.write_bytes(label.read_bytes()[: label.stat().st_size * 2 // 3])  # as a power cut leaves it
    assert nib.load(label).shape == rough.shape
    assert label in make().predict([path], tmp_path / "out")
    np.testing.assert_array_equal(labels(label), whole)


def test_a_label_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, make, write, small):
    synced, real = set(), module.os.fsync

    def fsync(handle):
        real(handle)
        synced.add((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    monkeypatch.setattr(module.os, "fsync", fsync)
    label, overlay, _ = make().predict([write(tmp_path / "a.nii.gz", small())], tmp_path / "out")
    assert {(p.stat().st_ino, p.stat().st_size) for p in (label, overlay)} <= synced


def test_the_middle_of_an_uncompressed_file_counts(tmp_path, make, write):
    data = np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32)  # 256 KB
    path = write(tmp_path / "a.nii", data)
    make().predict([path], tmp_path / "out")
    data[:, :, 20] += 1
    write(path, data)
    with pytest.raises(UserError, match="of another model or another image"):
        make().predict([path], tmp_path / "out")


@pytest.mark.parametrize("change", ["model", "image", "orientation", "label"])
def test_results_of_another_model_or_image_are_not_mistaken(tmp_path, change, make, write, small):
    path, model = write(tmp_path / "a.nii.gz", small()), make()
    label = model.predict([path], tmp_path / "out")[0]
    before = label.read_bytes()
    if change == "model":
        with torch.no_grad():
            model.network.scale.fill_(2)
    elif change == "image":
        write(path, small(5))
    elif change == "orientation":
        model.use_axes("LPS")
    else:
        label.write_bytes(before[:30])
        before = label.read_bytes()
    with pytest.raises(UserError, match=r"a_seg\.nii\.gz: is there, and of another.*overwrite=true"):
        model.predict([path], tmp_path / "out")
    assert label.read_bytes() == before
    assert model.predict([path], tmp_path / "out", overwrite=True)[0] == label
