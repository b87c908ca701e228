"""Labels from windows against MONAI's whole logits, and what they cost in memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bestiary.shared.core.specs import DataSpec
from bestiary.shared.data.preprocess import resampled_argmax
from bestiary.shared.vision.ensemble import Ensemble
from bestiary.shared.vision.segmentation import SegmentationModel
from bestiary.shared.vision.windows import Windows, windowed_labels


def network(dims, classes=7):
    torch.manual_seed(0)
    return {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims](1, classes, 3, padding=1)


def whole(net, image, patch, overlap):
    from monai.inferers import sliding_window_inference

    with torch.no_grad():
        return sliding_window_inference(image[None], patch, 1, net, overlap=overlap, mode="gaussian")[0]


def grids(shape):
    """The image's own grid, a finer one, a coarser one, and one that is finer along the rows alone."""
    yield shape
    yield tuple(2 * n - 1 for n in shape)
    yield tuple(max(n // 2, 1) for n in shape)
    yield (3 * shape[0], *(max(n // 3, 1) for n in shape[1:]))


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("memory_mb", [2000, 0.02])  # the second cuts the image across
@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((20, 22, 18), (8, 8, 8)),
        ((5, 30, 9), (8, 8, 8)),
        ((3, 3, 3), (8, 8, 8)),
        ((17, 40), (8, 8)),
        ((30, 9), (8, 16)),
    ],
)
def test_the_labels_are_those_of_the_whole_logits(shape, patch, memory_mb, overlap):
    net, image = network(len(shape)), torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    logits = whole(net, image, patch, overlap)
    for grid in grids(shape):
        found = windowed_labels([Windows(net, image, patch, overlap, 2)], 7, grid, memory_mb=memory_mb)
        assert found.dtype == np.uint8
        # Conv kernels round differently in other batches, so that two classes may tie.
        assert (found != resampled_argmax(logits, grid).numpy()).mean() < 1e-3


class Placed(torch.nn.Module):
    """Logits that depend on the place in the window and on both channels, with other weights along each axis.

    A window that is taken at another place, turned, or weighed otherwise gives other labels; with a convolution alone
    it would not.
    """

    def __init__(self, patch, channels=2, classes=7, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[len(patch)](channels, classes, 3, padding=1)
        self.place = torch.nn.Parameter(torch.randn(classes, *patch))

    def forward(self, x):
        return 2 * self.conv(x) + self.place


def segmenter(patch, seed=0, **options):
    names = tuple(f"class {number}" for number in range(7))
    spec = DataSpec("seg", ("T1", "T2"), len(patch), 2, 7, names, (0.0,) * len(patch), patch, ((1,) * len(patch),))
    return SegmentationModel(Placed(patch, seed=seed), spec, sw_batch=2, **options).eval()


@pytest.mark.parametrize("mirror_tta", [False, True])
@pytest.mark.parametrize("memory_mb", [2000, 0.02])
@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [((13, 12, 11), (6, 8, 4), 0.5), ((4, 14, 9), (6, 4, 8), 0.3), ((17, 33), (8, 10), 0.7)],
)
def test_a_network_that_knows_places_and_channels(shape, patch, overlap, memory_mb, mirror_tta):
    model = segmenter(patch, sw_overlap=overlap, mirror_tta=mirror_tta, logits_mb=memory_mb)
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    logits = whole(model._window, image, patch, overlap)
    plain = whole(model.network, image, patch, overlap)
    assert ((logits - plain).abs().max() > 0.1) == mirror_tta  # mirroring counts in this network
    for grid in grids(shape):
        assert (model.infer_labels(image, grid) != resampled_argmax(logits, grid).numpy()).mean() < 1e-3


@pytest.mark.parametrize("memory_mb", [2000, 0.05])
@pytest.mark.parametrize("shape", [(13, 12, 11), (3, 14, 9)])
def test_the_labels_of_an_ensemble_are_those_of_its_whole_probabilities(shape, memory_mb):
    """Members with other patches, overlaps and mirroring."""
    kinds = [((6, 8, 4), 0.5, True), ((4, 4, 8), 0.3, False), ((10, 6, 6), 0.6, False)]
    members = [
        segmenter(patch, seed, sw_overlap=overlap, mirror_tta=mirror, logits_mb=memory_mb)
        for seed, (patch, overlap, mirror) in enumerate(kinds)
    ]
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    shares = [
        whole(m._window, image, patch, overlap).softmax(0)
        for m, (patch, overlap, _) in zip(members, kinds, strict=True)
    ]
    mean = torch.stack(shares).mean(0)
    for grid in grids(shape):
        found = Ensemble(members).infer_labels(image, grid)
        assert (found != resampled_argmax(mean, grid).numpy()).mean() < 1e-3
    assert (mean.argmax(0) != shares[0].argmax(0)).float().mean() > 0.1


def test_many_classes_need_wider_numbers():
    net = network(3, classes=300)
    with torch.no_grad():
        net.bias[299] = 100
    found = windowed_labels([Windows(net, torch.zeros(1, 4, 4, 4), (4, 4, 4))], 300, (4, 4, 4))
    assert found.dtype == np.int16
    assert (found == 299).all()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("memory_mb", [8, 2])
def test_no_tensor_is_larger_than_allowed(memory_mb, networks):
    net, image = torch.nn.Conv3d(1, 120, 1), torch.randn(1, 40, 48, 48)
    with Largest() as seen:
        windowed_labels([Windows(net, image, (4, 8, 8))] * networks, 120, image.shape[1:], memory_mb=memory_mb)
    assert 0 < seen.bytes <= memory_mb * 1e6 / networks
    with Largest() as seen:
        whole(net, image, (4, 8, 8), 0.5)
    assert seen.bytes == 4 * 120 * 40 * 48 * 48  # 44 MB


PEAK = """
import json, sys, torch
from monai.inferers import sliding_window_inference
from bestiary.shared.data.preprocess import resampled_argmax
from bestiary.shared.vision.windows import Windows, windowed_labels

torch.set_num_threads(1)
net, image = torch.nn.Conv3d(1, 130, 1), torch.randn(1, 40, 96, 96)

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000

with torch.no_grad():
    sliding_window_inference(image[None, :, :8, :8, :8], (8, 8, 8), 1, net)
    before = peak()
    ours = windowed_labels([Windows(net, image, (8, 24, 24))], 130, image.shape[1:], memory_mb=40)
    bounded = peak()
    logits = sliding_window_inference(image[None], (8, 24, 24), 1, net, overlap=0.5, mode="gaussian")[0]
    theirs = resampled_argmax(logits, image.shape[1:]).numpy()
print(json.dumps([bounded - before, peak() - before, float((ours != theirs).mean())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_process_stays_small_with_130_classes(clean_env, root):
    job = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        env=clean_env(PYTHONPATH=str(root / "src"), MALLOC_MMAP_THRESHOLD_="65536"),
    )
    bounded, unbounded, differing = json.loads(job.stdout)
    assert unbounded > 190  # 130 x 40 x 96 x 96 x 4 bytes are 192 MB
    assert bounded < 90  # the 40 that were allowed, and two windows of 130 x 8 x 24 x 24
    assert differing < 1e-3
