"""Plan files: bestiary's, nnU-Net's, and what a data set takes from them."""

import json

import pytest
import yaml

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.planning.plan import read_plan, write_plan
from bestiary.shared.data.planning.remarks import differs_from_plan

PROPERTIES = {"mean": 85.14, "std": 116.55, "percentile_00_5": -935.0, "percentile_99_5": 294.0, "median": 90.0}


def nnunet(transpose=(0, 1, 2), residual=False, **changes):
    """A plans file as nnunetv2 2.8.1 writes it, in short."""
    arch = {
        "n_stages": 3,
        "features_per_stage": [32, 64, 128],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 4]],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 3, 4] if residual else [2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2],
    }
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    full = {
        "batch_size": 2,
        "patch_size": [8, 16, 32],
        "median_image_size_in_voxels": [10, 20, 40],
        "spacing": [3.0, 1.0, 0.5],
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
        "use_mask_for_norm": [False, True],
        "architecture": {"network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
                         "arch_kwargs": arch, "_kw_requires_import": []},
        "batch_dice": True,
    }  # fmt: skip
    return {
        "dataset_name": "Dataset007_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "configurations": {"3d_fullres": {**full, **changes}},
        "foreground_intensity_properties_per_channel": {"0": PROPERTIES, "1": PROPERTIES},
    }


def stored(tmp_path, values, name="nnUNetPlans.json"):
    file = tmp_path / name
    file.write_text(json.dumps(values))
    return file


def test_nnunets_plan(tmp_path):
    plan = read_plan(stored(tmp_path, nnunet()))
    network = plan.network
    assert (plan.name, network.patch_size, network.spacing) == ("3d_fullres", (8, 16, 32), (3.0, 1.0, 0.5))
    assert network.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 4))
    assert (network.features, network.convs, network.decoder_convs) == ((32, 64, 128), (2, 2, 2), (2, 2))
    assert (network.batch_size, network.batch_dice, network.residual) == (2, True, False)
    assert plan.normalization == (
        {"scheme": "ct", "lower": -935.0, "upper": 294.0, "mean": 85.14, "std": 116.55},
        {"scheme": "zscore"},
    )
    residual = read_plan(stored(tmp_path, nnunet(residual=True))).network
    assert (residual.residual, residual.convs, residual.decoder_convs) == (True, (1, 3, 4), (1, 1))


def test_a_transposed_plan_is_turned_to_the_files(tmp_path):
    # nnU-Net's first axis is the files' last (x), then z and y: transpose_forward [2, 0, 1].
    plan = read_plan(stored(tmp_path, nnunet(transpose=(2, 0, 1))))
    assert plan.network.patch_size == (16, 32, 8)
    assert plan.network.spacing == (1.0, 0.5, 3.0)
    assert plan.network.strides[2] == (2, 4, 2)
    assert plan.network.kernel_sizes[0] == (3, 3, 1)
    assert plan.order == (2, 0, 1)


def test_older_and_inherited_configurations(tmp_path):
    values = nnunet()
    full = values["configurations"]["3d_fullres"]
    del full["architecture"]
    full |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 64,
        "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
    }
    values["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 5}
    values["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file = stored(tmp_path, values)
    assert read_plan(file).network.features == (32, 64, 64)
    mine = read_plan(file, "mine").network
    assert (mine.batch_size, mine.patch_size) == (5, (8, 16, 32))
    with pytest.raises(ConfigError, match="cascade"):
        read_plan(file, "3d_cascade_fullres")
    with pytest.raises(ConfigError, match="3d_fullres, mine"):
        read_plan(file, "2d")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "no configurations"),
        (json.dumps({"configurations": {"2d": {}}}), "format"),
        (json.dumps({"format": 1, "configurations": {"2d": {}}}), "'spacing'"),
        (json.dumps(nnunet(spacing=[1.0, 1.0])), "do not fit"),
        (json.dumps(nnunet(patch_size=["a", 1, 2])), "cannot be read"),
    ],
)
def test_what_is_no_plan_is_said(tmp_path, values, words):
    file = tmp_path / "plan.json"
    file.write_text(values)
    with pytest.raises(BadDataError, match=words) as error:
        read_plan(file)
    assert str(file) in str(error.value)


def test_what_is_not_known_is_refused(tmp_path):
    values = nnunet()
    values["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "x.PrimusUNet"
    file = stored(tmp_path, values)
    with pytest.raises(ConfigError, match="PrimusUNet"):
        read_plan(file)
    file = stored(tmp_path, nnunet(normalization_schemes=["MyNormalization"] * 2))
    with pytest.raises(ConfigError, match="MyNormalization"):
        read_plan(file)
    with pytest.raises(MissingDataError, match=r"tools/plan\.py"):
        read_plan(tmp_path / "none.yaml")


def test_a_data_set_takes_what_is_not_given_from_its_plan(folder):
    root = folder()
    stored(root, nnunet())
    data = NnUNetFolder(root, plan="auto")
    spec = data.spec()
    assert (spec.patch_size, spec.spacing) == ((8, 16, 32), (3.0, 1.0, 0.5))
    assert spec.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 4))
    assert spec.kernel_sizes[0] == (1, 3, 3)
    assert data.normalization()[0]["lower"] == -935.0
    data.check()
    mine = NnUNetFolder(root, plan="auto", patch_size=(8, 8, 16), spacing=(0, 0, 0), kernel_sizes=[])
    assert (mine.patch_size, mine.spacing, mine.spec().kernel_sizes) == ((8, 8, 16), (0.0, 0.0, 0.0), ())
    assert mine.spec().strides == spec.strides


def test_a_plan_for_other_channels_is_refused(folder):
    root = folder(channels=("CT",))
    stored(root, nnunet())
    with pytest.raises(ConfigError, match="is a plan for the channels"):
        NnUNetFolder(root, plan="auto").normalization()
    with pytest.raises(ConfigError, match=r"dataset\.plan"):
        NnUNetFolder(root, configuration="2d")
    (root / "nnUNetPlans.json").unlink()
    with pytest.raises(MissingDataError, match=r"bestiary_plan\.yaml.*tools/plan\.py"):
        NnUNetFolder(root, plan="auto")


def test_the_own_plan_comes_first(folder):
    root = folder()
    stored(root, nnunet())
    network = {
        "spacing": [2.0, 1.0, 1.0], "patch_size": [8, 16, 16], "median_shape": [9.0, 18.0, 20.0], "batch_size": 3,
        "strides": [[1, 1, 1], [2, 2, 2]], "kernel_sizes": [[3, 3, 3]] * 2, "features": [32, 64], "convs": [2, 2],
        "decoder_convs": [2], "residual": False, "batch_dice": False,
    }  # fmt: skip
    own = {"format": 1, "axes": "LPS", "channel_names": ["CT", "T2"], "configurations": {"3d_fullres": network},
           "normalization": [{"scheme": "none"}, {"scheme": "zscore_whole"}]}  # fmt: skip
    (root / "bestiary_plan.yaml").write_text(yaml.safe_dump(own))
    data = NnUNetFolder(root, plan="auto")
    assert (data.patch_size, data.axes()) == ((8, 16, 16), "LPS")
    assert data.normalization() == ({"scheme": "none"}, {"scheme": "zscore_whole"})
    # The files lie as RAS, so x and y are flipped.
    as_it_lies = NnUNetFolder(root, spacing=(2, 1, 1)).case("c0").label
    assert (data.case("c0").label == as_it_lies[:, ::-1, ::-1]).all()


def own(**changes):
    """A plan of bestiary's; changes go to where their key is."""
    level = {"spacing": [2, 1, 1], "patch_size": [8, 8, 12], "median_shape": [8, 10, 12], "batch_size": 2}
    level |= {"strides": [[1, 1, 1], [1, 2, 2]], "kernel_sizes": [[3, 3, 3]] * 2, "features": [4, 8]}
    level |= {"convs": [1, 1], "decoder_convs": [1], "residual": False, "batch_dice": False}
    plan = {"format": 1, "axes": "RAS", "channel_names": ["MR"], "normalization": [{"scheme": "zscore"}]}
    for key, value in changes.items():
        (plan if key in plan else level)[key] = value
    return {**plan, "configurations": {"3d_fullres": level}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patchsize": [8, 8, 8]}, "has a key 'patchsize'; did you mean 'patch_size'"),
        ({"patch_size": [8, 9, 12]}, r"patch_size \[8, 9, 12\] must be divisible by the product of the strides"),
        ({"patch_size": [-8, 8, 12]}, "must be over 0"),
        ({"patch_size": [8, 8]}, "does not fit the others in length"),
        ({"spacing": [0, 1, 1]}, "must be over 0"),
        ({"spacing": [float("nan"), 1, 1]}, "must be over 0"),
        ({"strides": [[1, 1, 1], [0, 2, 2]]}, "must be over 0"),
        ({"normalization": [{"scheme": "foo"}]}, "normalisation"),
        ({"normalization": ["zscore"]}, "cannot be read"),
        ({"axes": "XYZ"}, "axes 'XYZ' must be"),
        ({"axes": "RL"}, "axes 'RL' must be"),
        ({"axes": 3}, "axes 3 must be"),
    ],
)
def test_an_own_plan_that_was_edited_wrongly(tmp_path, changes, words):
    file = tmp_path / "bestiary_plan.yaml"
    file.write_text(yaml.safe_dump(own()))
    assert read_plan(file).axes == "RAS"
    file.write_text(yaml.safe_dump(own(**changes)))
    with pytest.raises(BadDataError, match=words) as error:
        read_plan(file)
    assert str(error.value).startswith(f"{file}: ")
    with pytest.raises(BadDataError, match="is a folder"):
        read_plan(tmp_path)


def test_another_plan_is_kept_and_the_same_is_not(tmp_path):
    file = tmp_path / "bestiary_plan.yaml"
    assert write_plan(file, {"a": 1}, ["head"]) is None
    assert write_plan(file, {"a": 1}, ["head"]) is None
    file.write_text("edited by hand")
    first = write_plan(file, {"a": 1}, ["head"])
    assert first is not None
    assert first.read_text() == "edited by hand"
    assert yaml.safe_load(file.read_text()) == {"a": 1}
    file.write_text("edited again")
    second = write_plan(file, {"a": 1}, ["head"])
    assert second not in (None, first)
    assert (first.read_text(), second.read_text()) == ("edited by hand", "edited again")
    assert len(list(tmp_path.iterdir())) == 3


def composed(**changes):
    values = {
        "recipe.batch_size": 2,
        "recipe.stages": {"t": {"objective": {"batch_dice": False}}},
        "encoder.features": [4, 8],
        "encoder.convs_per_stage": 1,
        "encoder._target_": "x.unet_plain_encoder",
        "model.network": {"decoder_convs": None},
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    out = {}
    for key, value in values.items():
        group, name = key.split(".")
        out.setdefault(group, {})[name] = value
    return out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"recipe__batch_size": 3}, ["recipe.batch_size is 3", "has 2"]),
        (
            {"recipe__stages": {"t": {"objective": {"batch_dice": True}}}},
            ["recipe.stages.t.objective.batch_dice is true"],
        ),
        ({"encoder__features": None}, ["encoder.features is [32,64]", "has [4,8]"]),
        ({"encoder__convs_per_stage": None, "model__network": {}}, ["encoder.convs_per_stage is [2,2]", "has [1,1]"]),
        ({"model__network": {"decoder_convs": 3}}, ["model.network.decoder_convs is [3]", "has [1]"]),
        ({"encoder___target_": "x.unet_residual_encoder"}, ["encoder is unet_residual", "has unet_plain"]),
    ],
)
def test_what_a_plan_does_not_set_is_said(tmp_path, changes, said):
    file = tmp_path / "bestiary_plan.yaml"
    file.write_text(yaml.safe_dump(own()))
    lines = differs_from_plan(read_plan(file), composed(**changes))
    assert len(lines) == bool(said), lines
    assert all(word in lines[0] for word in said), lines
