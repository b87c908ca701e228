import pickle

import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.augment import Augment
from bestiary.shared.data.volumes import Volume, VolumeSource, crop_or_pad, is_oversampled


class Toy(VolumeSource):
    """Three volumes whose voxels carry their own number, with a small blob of foreground."""

    revision = "toy-1"

    def __init__(self, shape=(20, 22, 24), patch_size=(8, 8, 8), labels=2, **options):
        self.shape, self.loaded = shape, []
        super().__init__(
            class_names=["background", "blob"],
            modalities=["T1"],
            spacing=[1.0] * len(patch_size),
            patch_size=patch_size,
            **options,
        )
        self.labels = labels

    def case_ids(self, split):
        return {"train": ["a", "b", "c"], "val": ["d"], "test": []}[split]

    def load_case(self, case_id):
        self.loaded.append(case_id)
        image = np.arange(1, np.prod(self.shape) + 1, dtype=np.float32).reshape(1, *self.shape)
        label = np.zeros(self.shape, np.int16)
        label[tuple(slice(n // 2, n // 2 + 2) for n in self.shape)] = self.labels - 1
        return Volume(case_id, image, label, np.eye(4), self.spacing)

    def check(self):
        pass


STREAM = Stream(seed=7, stage="train", global_batch=4)


def test_it_is_a_data_source():
    assert isinstance(Toy(), DataSource)


def test_sample_k_depends_on_nothing_but_its_number():
    options = {"augment": Augment(strength=3)}
    forward = [Toy(**options).train_example(k, STREAM) for k in range(6)]
    source = Toy(**options)
    backward = {k: source.train_example(k, STREAM) for k in reversed(range(6))}
    for k, example in enumerate(forward):
        assert example["id"] == backward[k]["id"]
        assert torch.equal(example["image"], backward[k]["image"])
        assert torch.equal(example["label"], backward[k]["label"])
    other = Toy(**options).train_example(0, Stream(seed=8, stage="train", global_batch=4))
    assert not torch.equal(other["image"], forward[0]["image"])


def test_every_case_is_seen_once_each_time_round():
    source = Toy()
    cases = [source.train_example(k, STREAM)["meta"]["case"] for k in range(6)]
    assert sorted(cases[:3]) == sorted(cases[3:]) == ["a", "b", "c"]


def test_the_last_places_of_a_batch_show_foreground():
    source = Toy(shape=(40, 40, 40))
    examples = [source.train_example(k, STREAM) for k in range(40)]
    forced = [k for k, example in enumerate(examples) if example["meta"]["foreground"]]
    assert forced == [k for k in range(40) if k % 4 == 3]
    assert all(examples[k]["label"].any() for k in forced)
    others = [bool(examples[k]["label"].any()) for k in range(40) if k not in forced]
    assert np.mean(others) < 0.5


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, []), (2, [1]), (3, [2]), (4, [3]), (6, [4, 5]), (12, [8, 9, 10, 11])]
)
def test_places_of_oversampling(batch, expected):
    assert [k for k in range(batch) if is_oversampled(k, batch, 0.33)] == expected


def test_patches_cover_the_volume_and_stay_inside():
    source = Toy(oversample=0)
    corners = np.array([source.train_example(k, STREAM)["meta"]["corner"] for k in range(300)])
    np.testing.assert_array_equal(corners.min(0), [0, 0, 0])
    np.testing.assert_array_equal(corners.max(0), [12, 14, 16])


def test_a_patch_is_the_volume_at_its_corner():
    source = Toy()
    volume = source.case("a")
    for k in range(5):
        example = source.train_example(k, STREAM)
        where = tuple(slice(c, c + 8) for c in example["meta"]["corner"])
        np.testing.assert_array_equal(example["image"][0].numpy(), volume.image[0][where])
        np.testing.assert_array_equal(example["label"][0].numpy(), volume.label[where])


@pytest.mark.parametrize("k", range(4))
def test_a_volume_smaller_than_the_patch_is_padded_with_zeros(k):
    example = Toy(shape=(5, 22, 6)).train_example(k, STREAM)
    image = example["image"][0]
    assert image.shape == (8, 8, 8)
    inside = (image != 0).nonzero()
    assert [len(set(inside[:, axis].tolist())) for axis in range(3)] == [5, 8, 6]
    assert example["meta"]["corner"][0] == -1


def test_two_dimensions():
    source = Toy(shape=(20, 9), patch_size=(8, 12))
    example = source.train_example(3, STREAM)
    assert example["image"].shape == (1, 8, 12)
    assert source.spec().spatial_dims == 2


def test_held_out_is_whole_and_lazy():
    source = Toy()
    examples = source.held_out("val")
    assert source.loaded == []
    assert len(examples) == 1
    assert examples[0]["image"].shape == (1, 20, 22, 24)
    assert examples[0]["label"].dtype == torch.int64
    assert source.loaded == ["d"]
    assert len(examples[:1]) == 1
    with pytest.raises(IndexError):
        examples[1]
    assert list(source.held_out("test")) == []


def test_memory_is_bounded_and_not_pickled():
    source = Toy(cache_mb=0.1)  # two volumes need more
    for case in "aba":
        source.case(case)
    assert source.loaded == ["a", "b", "a"]
    roomy = Toy()
    for case in "aba":
        roomy.case(case)
    assert roomy.loaded == ["a", "b"]
    assert len(pickle.dumps(roomy)) < 10_000


def test_labels_outside_the_classes_are_bad_data():
    with pytest.raises(BadDataError, match="2 classes"):
        Toy(labels=3).case("a")


def test_wrong_requests_are_said():
    with pytest.raises(ConfigError):
        Toy().held_out("dev")
    with pytest.raises(ConfigError):
        Toy().train_example(0, STREAM, part="chat")
    with pytest.raises(ConfigError):
        Toy(oversample=33)


def test_crop_or_pad():
    array = np.arange(1, 7).reshape(2, 3)
    np.testing.assert_array_equal(crop_or_pad(array, (-1, 1), (3, 3)), [[0, 0, 0], [2, 3, 0], [5, 6, 0]])
    np.testing.assert_array_equal(crop_or_pad(array, (0, 0), (2, 2)), [[1, 2], [4, 5]])
    np.testing.assert_array_equal(crop_or_pad(array, (5, 5), (2, 2)), np.zeros((2, 2)))
