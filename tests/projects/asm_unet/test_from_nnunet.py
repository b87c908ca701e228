"""Models of nnU-Net v2: checkpoints with its names (measured on nnunetv2 2.8.1) against a forward written by hand."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bestiary.projects.asm_unet.convert import from_nnunet, import_nnunet
from bestiary.shared.core.checkpoint import load_checkpoint
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.hub.nnunet import read_nnunet

FEATURES, STRIDES, KERNELS = [4, 6, 8], [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
BLOCKS = [1, 2, 2]


def both(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def unit(name, out, *rest, bias=True):
    """A conv and its norm, and the aliases that nnU-Net's modules write."""
    parts = both(f"{name}.conv", out, *rest) | both(f"{name}.norm", out)
    if not bias:
        del parts[f"{name}.conv.bias"]
    alias = {k.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1."): v for k, v in parts.items()}
    return parts | alias


def state_dict(residual):
    shapes = unit("encoder.stem.convs.0", 4, 2, *KERNELS[0]) if residual else {}
    before = 4 if residual else 2
    for i, (c, k, s) in enumerate(zip(FEATURES, KERNELS, STRIDES, strict=True)):
        for j in range(BLOCKS[i] if residual else 2):
            inner = c if j else before
            if not residual:
                shapes |= unit(f"encoder.stages.{i}.0.convs.{j}", c, inner, *k)
                continue
            name = f"encoder.stages.{i}.blocks.{j}"
            shapes |= unit(f"{name}.conv1", c, inner, *k) | unit(f"{name}.conv2", c, c, *k)
            if inner != c:
                shapes |= unit(f"{name}.skip.{int(max(s) > 1)}", c, inner, 1, 1, 1, bias=False)
        before = c
    shapes |= {f"decoder.{k}": v for k, v in shapes.items()}
    for n, level in enumerate((1, 0)):
        shapes |= {f"decoder.transpconvs.{n}.weight": (FEATURES[level + 1], FEATURES[level], *STRIDES[level + 1])}
        shapes |= {f"decoder.transpconvs.{n}.bias": (FEATURES[level],)}
        for j in range(1 if residual else 2):
            inner = FEATURES[level] * (1 if j else 2)
            shapes |= unit(f"decoder.stages.{n}.convs.{j}", FEATURES[level], inner, *KERNELS[level])
        shapes |= both(f"decoder.seg_layers.{n}", 3, FEATURES[level], 1, 1, 1)
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(*shape, generator=g) * 0.3 for name, shape in shapes.items()}


def forward(w, x, residual):
    """nnU-Net's net as functions: convolution, instance norm, LeakyReLU 0.01; ResNet-D blocks where residual."""

    def conv(x, name, stride=(1, 1, 1), act=True):
        kernel = w[f"{name}.conv.weight"]
        x = F.conv3d(x, kernel, w.get(f"{name}.conv.bias"), stride, [k // 2 for k in kernel.shape[2:]])
        x = F.instance_norm(x, weight=w[f"{name}.norm.weight"], bias=w[f"{name}.norm.bias"], eps=1e-5)
        return F.leaky_relu(x, 0.01) if act else x

    def block(x, name, stride):
        y = conv(conv(x, f"{name}.conv1", stride), f"{name}.conv2", act=False)
        skip = F.avg_pool3d(x, stride, stride) if max(stride) > 1 else x
        place = f"{name}.skip.{int(max(stride) > 1)}"
        return F.leaky_relu(y + (conv(skip, place, act=False) if f"{place}.conv.weight" in w else skip), 0.01)

    skips = []
    if residual:
        x = conv(x, "encoder.stem.convs.0")
    for i, stride in enumerate(STRIDES):
        for j in range(BLOCKS[i] if residual else 2):
            step = (1, 1, 1) if j else tuple(stride)
            if residual:
                x = block(x, f"encoder.stages.{i}.blocks.{j}", step)
            else:
                x = conv(x, f"encoder.stages.{i}.0.convs.{j}", step)
        skips.append(x)
    for n, level in enumerate((1, 0)):
        kernel = w[f"decoder.transpconvs.{n}.weight"]
        up = F.conv_transpose3d(x, kernel, w[f"decoder.transpconvs.{n}.bias"], STRIDES[level + 1])
        x = torch.cat([up, skips[level]], 1)
        for j in range(1 if residual else 2):
            x = conv(x, f"decoder.stages.{n}.convs.{j}")
    return F.conv3d(x, w["decoder.seg_layers.1.weight"], w["decoder.seg_layers.1.bias"])


def plans(residual, transpose):
    arch = {
        "n_stages": 3, "features_per_stage": FEATURES, "kernel_sizes": KERNELS, "strides": STRIDES,
        ("n_blocks_per_stage" if residual else "n_conv_per_stage"): BLOCKS if residual else [2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2],
    }  # fmt: skip
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    full = {
        "batch_size": 2, "patch_size": [4, 8, 16], "median_image_size_in_voxels": [4, 8, 16],
        "spacing": [5.0, 1.0, 0.5],
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"], "use_mask_for_norm": [False, True],
        "architecture": {"network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
                         "arch_kwargs": arch, "_kw_requires_import": []}, "batch_dice": False,
    }  # fmt: skip
    numbers = {"mean": 10.0, "std": 20.0, "percentile_00_5": -50.0, "percentile_99_5": 90.0}
    return {
        "dataset_name": "Dataset001_X", "plans_name": "nnUNetPlans", "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": transpose, "configurations": {"3d_fullres": full},
        "foreground_intensity_properties_per_channel": {"0": numbers, "1": numbers},
    }  # fmt: skip


def checkpoint(folder, residual=False, transpose=(0, 1, 2), fold=0, **changes):
    """What nnUNetTrainer.save_checkpoint writes, training curves with numpy's numbers included."""
    values = {
        "network_weights": state_dict(residual),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(-0.25)], "lrs": [0.01]},
        "_best_ema": np.float64(0.4),
        "current_epoch": 1,
        "init_args": {
            "plans": plans(residual, list(transpose)),
            "configuration": "3d_fullres",
            "fold": fold,
            "dataset_json": {"channel_names": {"0": "CT", "1": "T2"}, "file_ending": ".nrrd",
                             "labels": {"background": 0, "spleen": 2, "liver": 1}, "numTraining": 5},
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **changes,
    }  # fmt: skip
    path = folder / f"fold_{fold}" / "checkpoint_final.pth"
    path.parent.mkdir(parents=True)
    torch.save(values, path)
    return path


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_the_logits_are_nnunets(tmp_path, residual, transpose):
    path = checkpoint(tmp_path, residual, transpose)
    model = from_nnunet(path)
    x = torch.randn(2, 2, 4, 8, 16, generator=torch.Generator().manual_seed(2))  # in the axes of nnU-Net's network
    wanted = forward(read_nnunet(path).weights, x, residual)
    back = [2 + transpose.index(axis) for axis in range(3)]
    with torch.no_grad():
        found = model.network(x.permute(0, 1, *back))
    torch.testing.assert_close(found, wanted.permute(0, 1, *back), rtol=1e-4, atol=1e-5)


def test_the_rest_comes_from_its_plans(tmp_path):
    model = from_nnunet(checkpoint(tmp_path, transpose=(2, 0, 1)))
    spec = model.spec
    assert (spec.patch_size, spec.spacing) == ((8, 16, 4), (1.0, 0.5, 5.0))
    assert spec.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 2))
    assert spec.class_names == ("background", "liver", "spleen")
    assert spec.modalities == ("CT", "T2")
    assert model.schemes()[0] == {"scheme": "ct", "lower": -50.0, "upper": 90.0, "mean": 10.0, "std": 20.0}
    assert model.schemes()[1] == {"scheme": "zscore"}
    assert model.axes() == "RAS"
    assert model.mirror_tta


def test_the_tool_writes_a_checkpoint(tmp_path):
    checkpoint(tmp_path / "model", residual=True, inference_allowed_mirroring_axes=None)
    lines = import_nnunet(tmp_path / "model", tmp_path / "out")
    model, structure = load_checkpoint(tmp_path / "out")
    assert not model.mirror_tta
    assert structure.choices["encoder"] == "unet_residual"
    for name, value in from_nnunet(tmp_path / "model").state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    assert json.loads((tmp_path / "out" / "nnUNetPlans.json").read_text())["plans_name"] == "nnUNetPlans"
    assert "'encoder.features=[4,6,8]'" in lines[-1]
    assert f"init_from={tmp_path / 'out'}" in lines[-1]
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        import_nnunet(tmp_path / "model", tmp_path / "out")


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    trained = tmp_path / "Dataset001_X" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    path = checkpoint(trained)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    for given in (path, path.parent, trained, "Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres"):
        assert read_nnunet(given).file == path
    second = checkpoint(trained, fold=1)
    assert read_nnunet(trained, 1).fold == "1"
    with pytest.raises(MissingDataError, match="fold_0, fold_1: say which with fold="):
        read_nnunet(trained)
    second.unlink()
    with pytest.raises(MissingDataError, match=r"checkpoint_final\.pth"):
        read_nnunet(second.parent)
    with pytest.raises(MissingDataError, match=f"nor in {tmp_path}"):
        read_nnunet("Dataset002_Y")


def test_files_that_numpy_1_wrote_are_read(tmp_path):
    path = checkpoint(tmp_path)
    older = tmp_path / "older.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(older, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(item, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy._core" not in older.read_bytes()
    assert read_nnunet(older).class_names == ("background", "liver", "spleen")


class Evil:
    def __reduce__(self):
        return Path.write_text, (Path("ran"), "it ran")


def test_a_file_that_would_run_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "model", trainer_name=Evil())
    with pytest.raises(BadDataError, match="is not loaded"):
        read_nnunet(path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_said(tmp_path):
    path = checkpoint(tmp_path / "a", init_args={})
    with pytest.raises(BadDataError, match="no checkpoint of nnU-Net v2"):
        read_nnunet(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadDataError, match=r"checkpoint_final\.pth"):
        read_nnunet(path)
    short = state_dict(False)
    del short["encoder.stages.1.0.convs.0.conv.weight"]
    with pytest.raises(BadDataError, match="not those of its plans"):
        from_nnunet(checkpoint(tmp_path / "b", network_weights=short))
    with pytest.raises(BadDataError, match=r"not names of the official .*encoder\.extra"):
        from_nnunet(checkpoint(tmp_path / "c", network_weights={**state_dict(False), "encoder.extra": torch.zeros(1)}))
    shutil.rmtree(tmp_path / "c")
