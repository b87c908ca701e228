"""What a dataset.json can get wrong, each in words of its own."""

from pathlib import Path

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.nnunet_description import checked_description, read_dataset_json

GOOD = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}


def test_channels_come_in_the_order_of_their_numbers():
    many = {str(n): f"c{n}" for n in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
    found = checked_description({**GOOD, "channel_names": many}, Path("dataset.json"))
    assert found["channel_names"] == [f"c{n}" for n in range(11)]
    assert checked_description({**GOOD, "channel_names": ["x", "y"]}, Path("d"))["channel_names"] == ["x", "y"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_names": {"a": "T1"}}, "must number the channels 0, not a"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, "must number the channels 0, 1, not 0, 2"),
        ({"channel_names": "T1"}, "channel_names must be"),
        ({"channel_names": {}}, "needs channel_names, labels and file_ending"),
        ({"labels": ["background", "a"]}, "labels must be"),
        ({"labels": {"background": 0, "all": [1, 2]}}, "region-based labels are not read"),
        ({"labels": {"0": "background", "1": "a"}}, "one whole number"),
        ({"labels": {"background": 0, "a": True}}, "one whole number"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "has an ignore label"),
        ({"labels": {"a": 1, "b": 2}}, "have no background"),
        ({"labels": {"background": 0}}, "the background alone"),
        ({"labels": {"background": 0, "a": 1, "b": 5}}, "0 to 2 without gaps: background 0, a 1, b 5. Renumber them"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "without gaps"),
        ({"file_ending": ".mha"}, "'.mha' is not read"),
        ({"file_ending": 3}, "3 is not read"),
    ],
)
def test_each_fault_is_said(changes, words):
    with pytest.raises(BadDataError, match=r"some/dataset\.json: .*" + words):
        checked_description({**GOOD, **changes}, Path("some/dataset.json"))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "is not JSON: .* Correct the file"), (b"\xff\xfe{", "is not JSON"), (b"[1]", "must be a JSON object")],
)
def test_what_is_no_object(tmp_path, content, words):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(BadDataError, match=rf"dataset\.json: {words}"):
        read_dataset_json(tmp_path / "dataset.json")
