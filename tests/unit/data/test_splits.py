"""The split by the hash of a name; split files and folds that are wrong."""

import hashlib
import json

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.data.splits import k_fold, load_fold, load_split, split_of


def test_a_tenth_each_is_held_out():
    names = [f"folder/file{i}.txt" for i in range(5000)]
    found = [split_of(name) for name in names]
    for split, share in (("train", 204 / 256), ("val", 26 / 256), ("test", 26 / 256)):  # 256 bytes modulo 10
        assert abs(found.count(split) / 5000 - share) < 4 * (share * (1 - share) / 5000) ** 0.5
    assert found == [split_of(name) for name in names]


def test_by_hand():
    for name, first in (("a", 0xCA), ("d", 0x18), ("e", 0x3F)):
        assert hashlib.sha256(name.encode()).digest()[0] == first
    # 0xca = 202, 0x18 = 24, 0x3f = 63; 0 is test, 1 is val.
    assert {split_of(name) for name in "ade"} == {"train"}
    by_place = {hashlib.sha256(n.encode()).digest()[0] % 10: split_of(n) for n in map(str, range(200))}
    assert by_place == {0: "test", 1: "val", **dict.fromkeys(range(2, 10), "train")}


LISTS = "must map train, val and test to lists of case ids"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train": "c0c1"}, LISTS),
        ({"train": {"c0": 1}}, LISTS),
        ({"train": 3}, LISTS),
        ({"train": [["c0"]]}, LISTS),
        ({"val": ["c0"]}, LISTS),
        ({"train": ["c0"], "1": ["c1"]}, LISTS),
        ({"train": ["c0", "c0"]}, "case c0 is in train and again in train"),
        ({"train": ["c0"], "val": ["c1"], "test": ["c1"]}, "case c1 is in val and again in test"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_split_file_that_is_none(tmp_path, content, words):
    file = tmp_path / "split.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(BadDataError, match=rf"split\.json: {words}") as error:
        load_split(file)
    assert "\n" not in str(error.value)


FOLDS = "must be a list of folds"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "cannot be read as JSON"),
        ("null", FOLDS),
        ("[]", FOLDS),
        ({"train": []}, FOLDS),
        ([{"train": "c0", "val": "c1"}], FOLDS),
        ([{"train": ["c0"]}], FOLDS),
        ([{"train": ["c0"], "val": None}], FOLDS),
        ([{"train": [], "val": ["c0"]}], "fold 0: train is empty"),
        ([{"train": ["c0", "c1"], "val": ["c1"]}], "fold 0: case c1 is in train and again in val"),
        ([{"train": ["c0", "c0"], "val": ["c1"]}], "fold 0: case c0 is in train and again in train"),
    ],
)
def test_folds_that_are_none(tmp_path, content, words):
    file = tmp_path / "splits_final.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BadDataError, match=rf"splits_final\.json: {words}"):
        load_fold(file, 0)


def test_a_case_may_be_validated_in_two_folds(tmp_path):
    """Folds that were drawn at random overlap; what counts is that none trains on what it is judged by."""
    folds = [{"train": ["c0", "c1"], "val": ["c2"]}, {"train": ["c0"], "val": ["c1", "c2"]}]
    (tmp_path / "f.json").write_text(json.dumps(folds))
    assert [load_fold(tmp_path / "f.json", n)["val"] for n in range(2)] == [["c2"], ["c1", "c2"]]


def test_a_fold_is_a_number(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps([{"train": ["c0"], "val": ["c1"]}]))
    with pytest.raises(ConfigError, match="no fold first"):
        load_fold(tmp_path / "f.json", "first")
    with pytest.raises(ConfigError, match="whole numbers"):
        k_fold(["c0", "c1"], "first", 2, 0)
