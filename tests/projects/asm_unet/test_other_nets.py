"""Other nets under ASM-UNet's plan and trainer: one override of the model, and everything else stays."""

import importlib
import inspect

import pytest
import torch

from bestiary.projects.asm_unet.model import build_network
from bestiary.projects.asm_unet.module import net_name
from bestiary.shared.core.build import build
from bestiary.shared.core.checkpoint import Structure, build_model, load_checkpoint, save_checkpoint
from bestiary.shared.core.config import compose, resolved
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.nn.mixers import FixedOrder
from bestiary.shared.vision.unet import unet_plain_encoder
from bestiary.shared.vision.unet_residual import unet_residual_encoder

NETS = {
    "umamba_bot": "U-Mamba Bot",
    "umamba_enc": "U-Mamba Enc",
    "segmamba": "SegMamba",
    "swin_unetr": "Swin UNETR",
}
STRIDES = ((1, 1), (2, 2), (2, 2), (2, 2))
SPEC = DataSpec("seg", ("T1",), 2, 1, 3, ("b", "x", "y"), (1, 1), (32, 32), STRIDES)
SMALL = {
    "umamba_bot": ["model.network.d_state=3"],
    "umamba_enc": ["model.network.d_state=3"],
    "segmamba": ["model.network.features=[4,6,8,10]", "model.network.depths=[1,1,1,1]"],
    "swin_unetr": ["model.network.depths=[1,1,1,1]"],
}


def structure(*overrides):
    cfg, choices = compose(["+project=asm_unet", *overrides])
    values = resolved(cfg)
    parts = {name: values.get(name) or None for name in ("model", "encoder", "backbone")}
    return Structure("asm_unet", choices, list(overrides), SPEC.to_dict(), parts)


@pytest.mark.parametrize("others", [[], ["encoder=none", "backbone=none"], ["encoder=unet_residual"]])
@pytest.mark.parametrize("name", NETS)
def test_one_override_builds_it_whatever_else_is_chosen(name, others):
    if name in ("segmamba", "swin_unetr"):
        pytest.importorskip("monai")
    with torch.device("meta"):
        model = build_model(structure(f"model={name}", *SMALL[name], *others))
    assert net_name(model) == NETS[name]
    assert not any("AdaptiveScan" in type(m).__name__ for m in model.modules())
    if name.startswith("umamba"):
        assert model.network.encoder.channels == (8, 16, 32, 48)  # the laptop plan's
        assert [len(level.convs) for level in model.network.encoder.levels] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", NETS)
def test_the_checkpoint_is_the_net(name, tmp_path):
    if name in ("segmamba", "swin_unetr"):
        pytest.importorskip("monai")
    plan = ["encoder.features=[4,6,8,10]", "model.sw_overlap=0"]
    built = structure(f"model={name}", *SMALL[name], *plan)
    model = build_model(built)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_checkpoint(tmp_path, model, built)
    loaded, _ = load_checkpoint(tmp_path)
    image = torch.randn(1, 40, 33)
    torch.testing.assert_close(loaded.infer(image), model.eval().infer(image))
    assert loaded.infer(image).shape == (3, 40, 33)


def test_the_plans_numbers_reach_them():
    cfg, _ = compose(
        ["+project=asm_unet", "model=umamba_enc", "encoder.features=[4,5,6,7]", "encoder.strides=[1,2,2,1]"]
    )
    network = resolved(cfg)["model"]["network"]
    assert (network["features"], network["strides"], network["convs_per_stage"]) == ([4, 5, 6, 7], [1, 2, 2, 1], 1)
    cfg, _ = compose(["+project=asm_unet", "model=segmamba"])
    assert resolved(cfg)["model"]["network"]["plan_features"] == [8, 16, 32, 48]
    cfg, _ = compose(["+project=asm_unet", "model=umamba_bot", "dataset=synapse"])
    network = resolved(cfg)["model"]["network"]
    assert (network["features"], network["convs_per_stage"]) == (None, 2)


@pytest.mark.parametrize("group, name", [*(("model", n) for n in NETS), ("encoder", "unet_residual")])
def test_configs_hold_the_defaults_of_their_targets(root, group, name):
    yaml = pytest.importorskip("yaml")
    node = yaml.safe_load((root / "conf" / group / f"{name}.yaml").read_text())
    node = node["network"] if group == "model" else node
    module, _, target = node.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), target)).parameters
    defaults = {k: p.default for k, p in parameters.items() if k not in ("spec", "mixer")}
    assert set(node) == set(defaults)
    for key, value in node.items():
        if isinstance(value, str):
            assert value.startswith("${oc.select:encoder.")
            value = {"null}": None, "2}": 2}[value.rpartition(",")[2]]
        assert value == (list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key])


def test_a_value_that_cannot_be_is_one_clear_error():
    pytest.importorskip("monai")
    node = {"_target_": "bestiary.shared.vision.swin_unetr.swin_unetr", "feature_size": 20}
    with pytest.raises(ConfigError, match="feature_size should be divisible by 12"):
        build(node, spec=SPEC)


def test_decoder_convolutions_go_with_the_encoder():
    def convs(encoder, **options):
        return [len(level.convs) for level in build_network(SPEC, encoder, **options).decoder.levels]

    widths = dict(features=[2, 4, 6, 8])
    assert convs(unet_plain_encoder(SPEC, **widths)) == [2, 2, 2]
    assert convs(unet_plain_encoder(SPEC, **widths, convs_per_stage=1)) == [1, 1, 1]
    assert convs(unet_plain_encoder(SPEC, **widths, convs_per_stage=[1, 1, 3, 3])) == [2, 2, 2]
    assert convs(unet_residual_encoder(SPEC, **widths)) == [1, 1, 1]
    assert convs(unet_residual_encoder(SPEC, **widths, convs_per_stage=2), decoder_convs=[1, 2, 3]) == [1, 2, 3]


def test_mixers_in_the_residual_encoder():
    mixer = FixedOrder(min_channels=4, d_state=3)
    encoder = unet_residual_encoder(SPEC, mixer, features=[4, 6, 8, 10], convs_per_stage=1)
    net = build_network(SPEC, encoder, mixer).eval()
    assert encoder.num_mixers == 3
    logits, orders = net(torch.randn(1, 1, 32, 32), return_orders=True)
    assert (logits.shape, orders) == ((1, 3, 32, 32), [])
    mixer = FixedOrder(min_channels=100)
    with pytest.raises(ConfigError, match="the mixer builds no block"):
        build_network(SPEC, unet_residual_encoder(SPEC, mixer, features=[4, 6, 8, 10]), mixer)


def test_adaptive_orders_come_out_of_the_residual_encoder():
    from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScan

    mixer = AdaptiveScan(min_channels=6, d_state=3, group_length=12)
    encoder = unet_residual_encoder(SPEC, mixer, features=[4, 6, 8, 10], convs_per_stage=1)
    _, orders = build_network(SPEC, encoder, mixer).eval()(torch.randn(1, 1, 32, 32), return_orders=True)
    assert [tuple(o.shape) for o in orders] == [(3, 1, 64), (3, 1, 16)]


def test_names_in_reports():
    widths = dict(features=[4, 6, 8, 10], convs_per_stage=1)
    mixer = FixedOrder(min_channels=4, d_state=3)

    class Holder(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

    def name(encoder, mixer=None):
        return net_name(Holder(build_network(SPEC, encoder, mixer)))

    assert name(unet_plain_encoder(SPEC, **widths)) == "plain net"
    assert name(unet_residual_encoder(SPEC, **widths)) == "residual net"
    assert name(unet_residual_encoder(SPEC, mixer, **widths), mixer) == "raster order"
