import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.data.augment import GROUPS, Augment, _margin, _resample
from bestiary.shared.data.volumes import crop_or_pad

VOLUME = np.random.default_rng(0).normal(size=(2, 30, 31, 32)).astype(np.float32)
LABEL = np.random.default_rng(1).integers(0, 4, size=(30, 31, 32))


def reader(patch, corner=(9, 10, 11)):
    def read(size):
        start = [c - (s - p) // 2 for c, s, p in zip(corner, size, patch, strict=True)]
        return crop_or_pad(VOLUME, start, size), crop_or_pad(LABEL, start, size)

    return read


def augmented(augment, patch=(12, 11, 10), seed=0):
    return augment(reader(patch), patch, np.random.default_rng(seed))


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_is_a_function_of_its_generator(group):
    # Strength 100 draws every transform of the group; mirroring has its own probability.
    image, label = augmented(Augment(groups=[group], strength=100), seed=3)
    again, label_again = augmented(Augment(groups=[group], strength=100), seed=3)
    plain, _ = augmented(Augment(groups=()), seed=3)
    assert image.shape == (2, 12, 11, 10)
    assert label.shape == (1, 12, 11, 10)
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    assert type(image) is torch.Tensor
    assert torch.equal(image, again)
    assert torch.equal(label, label_again)
    assert torch.isfinite(image).all()
    assert not torch.equal(image, plain)


def test_nothing_drawn_reads_the_patch_alone():
    sizes = []

    def read(size):
        sizes.append(size)
        return reader((12, 11, 10))(size)

    image, _ = Augment(strength=0, mirror_axes=())(read, (12, 11, 10), np.random.default_rng(0))
    assert sizes == [(12, 11, 10)]
    np.testing.assert_array_equal(image.numpy(), reader((12, 11, 10))((12, 11, 10))[0])


def test_the_identity_leaves_the_patch_where_it_was():
    patch = (12, 11, 10)
    read, matrix = reader(patch), np.eye(3)
    wide_image, wide_label = read(_margin(matrix, patch))
    image, label = _resample(torch.tensor(wide_image), torch.tensor(wide_label)[None], matrix, patch)
    np.testing.assert_allclose(image.numpy(), read(patch)[0], atol=1e-4)
    np.testing.assert_array_equal(label[0].numpy(), read(patch)[1])


def test_a_quarter_turn_moves_image_and_label_alike():
    patch = (5, 9, 9)
    read = reader(patch)
    matrix = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    wide_image, wide_label = read(_margin(matrix, patch))
    image, label = _resample(torch.tensor(wide_image), torch.tensor(wide_label)[None], matrix, patch)
    np.testing.assert_allclose(image.numpy(), np.rot90(read(patch)[0], 3, axes=(2, 3)), atol=1e-4)
    np.testing.assert_array_equal(label[0].numpy(), np.rot90(read(patch)[1], 3, axes=(1, 2)))


def test_anisotropic_patches_turn_in_their_plane_only():
    augment = Augment(strength=100)
    for seed in range(5):
        matrix = augment._draw_matrix((4, 16, 16), np.random.default_rng(seed))
        np.testing.assert_allclose(matrix[0], [1, 0, 0])
        np.testing.assert_allclose(matrix[:, 0], [1, 0, 0])
    free = augment._draw_matrix((16, 16, 16), np.random.default_rng(0))
    assert abs(free[0, 1]) > 1e-3


def test_two_dimensions():
    image = VOLUME[:1, 0]
    augment = Augment(strength=100)

    def read(size):
        return crop_or_pad(image, (3, 3), size), crop_or_pad(LABEL[0], (3, 3), size)

    out, label = augment(read, (16, 16), np.random.default_rng(0))
    assert out.shape == (1, 16, 16)
    assert label.shape == (1, 16, 16)
    assert torch.isfinite(out).all()


def test_a_blank_patch_stays_finite():
    def read(size):
        return np.zeros((1, *size), np.float32), np.zeros(size, np.int64)

    for patch in [(8, 8, 8), (2, 8, 8)]:
        image, _ = Augment(strength=100)(read, patch, np.random.default_rng(0))
        assert torch.isfinite(image).all()


def test_the_share_of_drawn_transforms_is_the_probability():
    augment = Augment(groups=["spatial"], rotation_p=0.2, scaling_p=0.2)
    drawn = [augment._draw_matrix((8, 8, 8), np.random.default_rng(s)) is not None for s in range(2000)]
    assert np.mean(drawn) == pytest.approx(1 - 0.8 * 0.8, abs=0.04)


@pytest.mark.parametrize("options", [{"groups": ["blurr"]}, {"gamma": (2, 1)}, {"noise_range": (0.1, 0.2)}])
def test_wrong_options_are_said(options):
    with pytest.raises(ConfigError):
        Augment(**options)
