"""The whole network: outputs, orders, the builder, and configs."""

import pytest
import torch

from bestiary.projects.asm_unet import adaptive_scan, model
from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScan
from bestiary.projects.asm_unet.model import ASMUNet, build_network
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.nn.mixers import FixedOrder
from bestiary.shared.vision.unet import unet_plain_encoder

TINY = dict(features=[4, 8, 12], asm_min_channels=4, d_state=3, group_length=12)
SPEC = DataSpec("seg", ("T1",), 3, 1, 3, ("b", "x", "y"), (1, 1, 1), (4, 8, 8), ((1, 1, 1), (1, 2, 2), (2, 2, 2)))


def tiny(axes=3, **options):
    strides = [1, (1,) * (axes - 2) + (2, 2), 2]
    return ASMUNet(axes, 1, 3, strides=strides, kernel_sizes=[3] * 3, **(TINY | options))


@pytest.mark.parametrize(("axes", "size"), [(2, (8, 12)), (3, (2, 8, 4))])
def test_outputs_and_orders(axes, size):
    torch.manual_seed(0)
    net, x = tiny(axes, asm_in_decoder=True), torch.randn(2, 1, *size)
    outputs, orders = net.train()(x, return_orders=True)
    assert [o.shape[1] for o in outputs] == [3, 3]
    assert outputs[0].shape[2:] == size
    assert outputs[1].shape[2:] < size
    lengths = [o.shape[-1] for o in orders]
    middle, bottom = outputs[1][0, 0].numel(), outputs[1][0, 0].numel() // 2**axes
    assert lengths == [middle, bottom, middle]
    assert all(o.shape[:2] == (3, 2) for o in orders)
    alone = net.eval()(x)
    assert alone.shape == (2, 3, *size)
    torch.testing.assert_close(alone, outputs[0])
    torch.testing.assert_close(net(x, return_orders=True)[0], alone)


def test_without_deep_supervision_training_gives_one_tensor():
    net = tiny(deep_supervision=False).train()
    assert net(torch.randn(1, 1, 2, 8, 4)).shape == (1, 3, 2, 8, 4)


@pytest.mark.parametrize("options", [{}, {"asm_in_decoder": True, "per_group_stack": True, "checkpoint": True}])
def test_every_parameter_gets_a_gradient(options):
    torch.manual_seed(0)
    net = tiny(**options).double().train()
    sum(o.pow(3).sum() for o in net(torch.randn(2, 1, 4, 8, 12, dtype=torch.float64))).backward()
    # a convolution's bias in front of InstanceNorm has a gradient of zero, so only its presence counts
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    zero = [n for n, p in net.named_parameters() if not p.grad.any() and not n.endswith("conv.bias")]
    assert missing == []
    assert zero == []


def test_size_that_does_not_fit():
    with pytest.raises(ValueError, match=r"divisible by the product of the strides \(2, 4, 4\)"):
        tiny()(torch.zeros(1, 1, 3, 8, 8))


def test_convs_per_stage_is_a_pair():
    net = tiny(convs_per_stage=[[1, 2, 1], 1])
    assert [len(level.convs) for level in net.encoder.levels] == [1, 2, 1]
    assert [len(level.convs) for level in net.decoder.levels] == [1, 1]
    with pytest.raises(ConfigError, match="pair"):
        tiny(convs_per_stage=(1, 2, 3))


def test_the_builder_makes_the_same_network():
    mixer = AdaptiveScan(min_channels=4, d_state=3, group_length=12)
    encoder = unet_plain_encoder(SPEC, mixer, features=[4, 8, 12])
    built = build_network(SPEC, encoder, mixer, asm_in_decoder=True)
    flat = tiny(asm_in_decoder=True)
    built.load_state_dict(flat.state_dict())
    x = torch.randn(1, 1, 2, 8, 4)
    torch.testing.assert_close(built.eval()(x), flat.eval()(x))


def test_other_mixers_and_none():
    x = torch.randn(1, 1, 4, 8, 8)
    raster = FixedOrder(min_channels=4, d_state=3)
    net = build_network(SPEC, unet_plain_encoder(SPEC, raster, features=[4, 8, 12]), raster)
    logits, orders = net.eval()(x, return_orders=True)
    assert logits.shape == (1, 3, 4, 8, 8)
    assert orders == []
    plain = build_network(SPEC, unet_plain_encoder(SPEC, None, features=[4, 8, 12]), None)
    assert plain.eval()(x).shape == logits.shape
    assert not any("mixer" in name for name in plain.state_dict())
    with pytest.raises(ConfigError, match="asm_in_decoder"):
        build_network(SPEC, unet_plain_encoder(SPEC, features=[4, 8, 12]), None, asm_in_decoder=True)
    with pytest.raises(ConfigError, match="pyramid"):
        build_network(SPEC, torch.nn.Linear(2, 2))


def test_the_block_is_reachable_from_both_modules():
    assert model.AdaptiveScanMamba is adaptive_scan.AdaptiveScanMamba


@pytest.mark.parametrize(
    "group, name", [("backbone", "adaptive_scan"), ("backbone", "raster"), ("encoder", "unet_plain")]
)
def test_configs_hold_the_defaults_of_their_targets(root, group, name):
    yaml = pytest.importorskip("yaml")
    import importlib
    import inspect

    node = yaml.safe_load((root / "conf" / group / f"{name}.yaml").read_text())
    assert node.pop("kind", None) == ("mixer" if group == "backbone" else None)
    module, _, target = node.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), target)).parameters
    defaults = {k: p.default for k, p in parameters.items() if k not in ("spec", "mixer")}
    assert node == defaults


def test_bfloat16_autocast_is_finite():
    """The net in 2D, of 3D the block alone: a bare bfloat16 nn.Conv3d reads unset memory in torch 2.14 on some CPUs."""
    torch.manual_seed(0)
    net, x = tiny(2), torch.randn(2, 1, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(x)
    sum(o.float().pow(2).sum() for o in outputs).backward()
    assert all(torch.isfinite(o).all() for o in outputs)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    block, tokens = adaptive_scan.AdaptiveScanMamba(8, 3), torch.randn(2, 8, 2, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(tokens)
    mixed.float().pow(2).sum().backward()
    assert torch.isfinite(mixed).all()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
