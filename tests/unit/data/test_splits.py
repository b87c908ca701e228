"""The split by the hash of a name."""

import hashlib

from bestiary.shared.data.splits import split_of


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
