"""The converter, on state dicts with the official names written out by hand."""

import pytest
import torch

from bestiary.projects.asm_unet.convert import from_official
from bestiary.projects.asm_unet.model import ASMUNet

FEATURES, N, R = [4, 8, 12], 3, 1


def mamba(name, d, branches=("", "_b", "_s")):
    e = 2 * d
    out = {f"{name}.in_proj.weight": (2 * e, d), f"{name}.out_proj.weight": (d, e)}
    for s in branches:
        out |= {
            f"{name}.conv1d{s}.weight": (e, 1, 4),
            f"{name}.conv1d{s}.bias": (e,),
            f"{name}.x_proj{s}.weight": (R + 2 * N, e),
            f"{name}.dt_proj{s}.weight": (e, R),
            f"{name}.dt_proj{s}.bias": (e,),
            f"{name}.A{s}_log": (e, N),
            f"{name}.D{s}": (e,),
        }
    return out


def both(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def block(name, d, per_group):
    score = f"{name}.scores_generation.individual_score_generator"
    out = both(f"{score}.0", d) | mamba(f"{score}.2", d) | both(f"{score}.3", 1, d)
    for g in range(3):
        out[f"{name}.scores_generation.group_score_embeddings.{g}"] = (12,)
        stack = f"{name}.stacked_mamba_layers" + (f".{g}" if per_group else "")
        for i in (0, 2):
            out |= both(f"{stack}.{i}.linear", d + 1, d + 1) | both(f"{stack}.{i}.norm", d + 1)
            out |= mamba(f"{stack}.{i}.mamba", d + 1) | both(f"{stack}.{i + 1}", d + 1)
    return out | both(f"{name}.proj_g.0", d, d + 1) | both(f"{name}.proj_g.1", d)


def official(per_group=False, decoder_blocks=False, deeper="0.", plain=False, seed=0):
    """A state dict with the official names, two convs per stage, blocks above 4 channels, aliases and all."""
    shapes, aliases = {}, {}

    def stage(name, level, c_in, c):
        for j in range(2):
            conv, norm = both(f"{name}convs.{j}.conv", c, c if j else c_in, 3, 3), both(f"{name}convs.{j}.norm", c)
            shapes.update(conv | norm)
            for k, v in conv.items():
                aliases[k.replace(".conv.", ".all_modules.0.")] = v
            for k, v in norm.items():
                aliases[k.replace(".norm.", ".all_modules.1.")] = v
        if c > 4 and not plain and (name.startswith("encoder") or decoder_blocks):
            shapes.update(block(f"{name}mamba", c, per_group))

    for i, (c_in, c) in enumerate(zip([1, 4, 8], FEATURES, strict=True)):
        stage(f"encoder.stages.{i}.{deeper}", i, c_in, c)
    for k, (below, c) in enumerate([(12, 8), (8, 4)]):
        shapes[f"decoder.transpconvs.{k}.weight"] = (below, c, 2, 2)
        shapes[f"decoder.transpconvs.{k}.bias"] = (c,)
        stage(f"decoder.stages.{k}.", k, 2 * c, c)
        shapes.update(both(f"decoder.seg_layers.{k}", 3, c, 1, 1))
    g = torch.Generator().manual_seed(seed)
    values = {k: torch.randn(*v, generator=g) for k, v in shapes.items()}
    for k, v in list(values.items()):
        if k.startswith("encoder."):
            values[f"decoder.{k}"] = v
    return values | {k: torch.zeros(*v) for k, v in aliases.items()}


def network(**options):
    return ASMUNet(2, 1, 3, FEATURES, [1, 2, 2], [3, 3, 3], d_state=N, group_length=12,
                   **({"asm_min_channels": 4} | options))  # fmt: skip


VARIANTS = {
    "enc": ({}, {}),
    "enc+dec": ({"decoder_blocks": True}, {"asm_in_decoder": True}),
    "lmls": ({"per_group": True}, {"per_group_stack": True}),
    "plain": ({"plain": True}, {"asm_min_channels": 99}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loads_strictly_and_covers_every_parameter(variant):
    theirs, ours = VARIANTS[variant]
    weights = official(**theirs)
    converted = from_official(weights)
    net = network(**ours)
    net.load_state_dict(converted, strict=True)
    assert set(converted) == set(dict(net.named_parameters()))
    # every value that arrives is one that was sent, each once, and what is left over is never used
    sent = {float(v.flatten()[0]) for k, v in weights.items() if not k.startswith("decoder.encoder") and v.any()}
    arrived = [float(row.flatten()[0]) for k, v in converted.items() for row in (v if "group_scores" in k else [v])]
    assert len(arrived) == len(set(arrived))
    assert set(arrived) <= sent
    left = [k for k, v in weights.items() if float(v.flatten()[0]) in sent - set(arrived)]
    assert all("stacked_mamba_layers" in k and ("_b" in k.split("mamba.")[-1] or "_s" in k.split("mamba.")[-1])
               for k in left)  # fmt: skip
    net.eval()(torch.randn(1, 1, 8, 8))


def test_values_go_where_they_belong():
    w = official(per_group=True, decoder_blocks=True)
    out = from_official(w)
    pairs = {
        "encoder.levels.1.convs.0.conv.weight": "encoder.stages.1.0.convs.0.conv.weight",
        "decoder.levels.0.convs.1.norm.bias": "decoder.stages.0.convs.1.norm.bias",
        "decoder.upsamples.1.weight": "decoder.transpconvs.1.weight",
        "decoder.heads.0.weight": "decoder.seg_layers.1.weight",
        "decoder.heads.1.bias": "decoder.seg_layers.0.bias",
        "encoder.levels.2.mixer.score.mamba.A_s_log":
            "encoder.stages.2.0.mamba.scores_generation.individual_score_generator.2.A_s_log",
        "encoder.levels.2.mixer.score.head.bias":
            "encoder.stages.2.0.mamba.scores_generation.individual_score_generator.3.bias",
        "encoder.levels.2.mixer.stacks.2.layers.1.mamba.dt_proj.bias":
            "encoder.stages.2.0.mamba.stacked_mamba_layers.2.2.mamba.dt_proj.bias",
        "encoder.levels.2.mixer.stacks.1.layers.0.out_norm.weight":
            "encoder.stages.2.0.mamba.stacked_mamba_layers.1.1.weight",
        "decoder.levels.0.mixer.proj_norm.bias": "decoder.stages.0.mamba.proj_g.1.bias",
    }  # fmt: skip
    for ours, theirs in pairs.items():
        assert torch.equal(out[ours], w[theirs]), ours
    row = w["decoder.stages.0.mamba.scores_generation.group_score_embeddings.1"]
    assert torch.equal(out["decoder.levels.0.mixer.group_scores"][1], row)


@pytest.mark.parametrize("deeper", ["", "0.", "0.0."])
def test_an_extra_or_missing_level_of_nesting(deeper):
    want = from_official(official())
    found = from_official(official(deeper=deeper))
    assert set(found) == set(want)


def test_compile_and_ddp_prefixes():
    weights = official()
    want = from_official(weights)
    wrapped = {f"module._orig_mod.{k}": v for k, v in weights.items()}
    inner = {k.replace("mamba.scores", "mamba._orig_mod.scores"): v for k, v in weights.items()}
    for variant in (wrapped, inner):
        found = from_official(variant)
        assert set(found) == set(want)
        assert all(torch.equal(found[k], want[k]) for k in want)


def test_group_vectors_of_any_shape():
    weights = {k: v.reshape(1, 1, -1) if "embeddings" in k else v for k, v in official().items()}
    network().load_state_dict(from_official(weights))


def test_for_a_network_with_one_head():
    net = network(deep_supervision=False)
    net.load_state_dict(from_official(official(), deep_supervision=False))


def test_unknown_names_are_one_error():
    extra = {"encoder.stages.1.0.mamba.attention.weight": torch.zeros(1), "something": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"not names of the official ASM-UNet: .*attention\.weight, something"):
        from_official(official() | extra)
    for name in ("encoder.stages.1.0.mamba.stacked_mamba_layers.0.weight", "encoder.stages.0.0.convs.0.bn.weight"):
        with pytest.raises(ValueError, match="not names"):
            from_official({name: torch.zeros(1)})


def test_missing_group_vectors_are_an_error():
    weights = official()
    del weights["encoder.stages.1.0.mamba.scores_generation.group_score_embeddings.0"]
    with pytest.raises(ValueError, match="incomplete"):
        from_official(weights)
