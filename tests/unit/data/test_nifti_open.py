"""Files that are cut, closed or no files, told from those that are only unusual."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.data import preprocess as pre

VOXELS = np.random.default_rng(0).integers(0, 999, (9, 8, 7)).astype(np.int16)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(VOXELS, np.diag([1, 2, 3, 1])), path)
    return path


@pytest.mark.parametrize("kept", [0.3, 0.8, 0.99])
def test_a_cut_file_is_refused_by_its_header(file, kept):
    whole = file.read_bytes()
    plain = file.with_suffix("")
    plain.write_bytes(gzip.decompress(whole))
    assert pre.read_header(plain).shape == pre.read_header(file).shape == (7, 8, 9)
    for path in (file, plain):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        with pytest.raises(BadDataError, match=rf"{path.name}: cannot be read .*get the file again"):
            pre.read_header(path)


def test_a_file_of_an_unusual_length_is_read(file):
    """Gzip in several pieces, which ends with the length of the last; and bytes after the voxels."""
    raw = gzip.decompress(file.read_bytes())
    for content in (gzip.compress(raw[:500]) + gzip.compress(raw[500:]), gzip.compress(raw + b"more")):
        file.write_bytes(content)
        assert pre.read_header(file).spacing == (3.0, 2.0, 1.0)
        np.testing.assert_array_equal(pre.read_volume(file)[0], VOXELS.T)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "circle.nii.gz").symlink_to("circle.nii.gz")
    for name, words in (("folder", "is a folder"), ("circle", "in a circle"), ("none", "there is no such file")):
        with pytest.raises(MissingDataError, match=f"{name}.nii.gz: .*{words}"):
            pre.read_header(tmp_path / f"{name}.nii.gz")


def test_a_file_that_may_not_be_read_is_not_called_damaged(file, monkeypatch):
    def closed(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(BadDataError, match=r"may not be read \(Permission denied\). Change its permissions"):
        pre.read_header(file)


def test_a_grid_that_no_image_has_is_refused():
    assert pre.target_shape((10, 10), (2.0, 1.0), (1.0, 1.0)) == (20, 10)
    header = pre.Header((99, 99, 99), (1000.0, 1000.0, 1000.0), np.eye(4))
    with pytest.raises(BadDataError, match=r"x.nii: resampling .* voxels. Is the voxel size in the header right"):
        pre.check_grid(Path("x.nii"), header, (1.0, 1.0, 1.0))
    pre.check_grid(Path("x.nii"), header, (0.0, 0.0, 0.0))
