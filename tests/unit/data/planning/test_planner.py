"""Plans against those of nnU-Net's own planner, stored in nnunetv2_plans.json, and by hand."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.data.planning.planner import PRESETS, Planner
from bestiary.shared.data.planning.topology import feature_map_size, topology

STORED = json.loads((Path(__file__).parent / "nnunetv2_plans.json").read_text())["plans"]


@pytest.mark.parametrize("stored", STORED, ids=lambda s: s["name"])
def test_the_plan_is_nnunets(stored):
    planner = Planner(stored["classes"], PRESETS[stored["planner"]], stored.get("gb"), stored.get("min_batch") or 2)
    rows = [row for row in stored["cases"] for _ in range(row[2])]
    found = planner.plan([row[0] for row in rows], [row[1] for row in rows])
    expected = stored["plan"]
    assert set(found.configurations) == set(expected["configurations"])
    for name, wanted in expected["configurations"].items():
        got = json.loads(json.dumps(asdict(found.configurations[name])))
        if name != "2d":
            order = expected["transpose"]
            for key in ("spacing", "patch_size"):
                got[key] = [got[key][axis] for axis in order]
            for key in ("strides", "kernel_sizes"):
                got[key] = [[level[axis] for axis in order] for level in got[key]]
        assert got.pop("spacing") == pytest.approx(wanted.pop("spacing"), rel=1e-9)
        assert {key: got[key] for key in wanted} == wanted


def test_the_published_plans_of_acdc_and_synapse():
    by_name = {stored["name"]: stored for stored in STORED}
    for name, patch in (("acdc_z5", [20, 256, 224]), ("acdc_z6.35", [14, 256, 224]), ("synapse", [48, 192, 192])):
        assert by_name[name]["plan"]["configurations"]["3d_fullres"]["patch_size"] == patch


def test_a_topology_by_hand():
    # 5 mm slices against 1.5 mm pixels: one in-plane halving brings 3 mm, then all axes go while they have 8 voxels.
    found = topology((5, 1.5, 1.5), (20, 64, 64))
    assert found.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert found.kernel_sizes == ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.divisor == (4, 16, 16)
    assert found.patch_size == (20, 64, 64)
    # (33, 16) halves to (17, 8) and (9, 4); 9 alone is under 12 and stays. So 4 must divide both.
    assert topology((1, 1), (33, 16)).patch_size == (36, 16)


def test_a_feature_map_size_by_hand():
    # Level 0: 2 convs x 4 channels x 64 pixels; level 1: 2 x 8 x 16. Decoder: (2 convs + 1) x 4 x 64; head: 3 x 64.
    assert feature_map_size((8, 8), ((1, 1), (2, 2)), (4, 8), (2, 2), (2,), 3) == 512 + 256 + 768 + 192
    # Residual: stem 4 x 64; level 0: one block 2 x 4 x 64; level 1: 3 blocks and a projection, 7 x 8 x 16.
    found = feature_map_size((8, 8), ((1, 1), (2, 2)), (4, 8), (1, 3), (1,), 3, residual=True)
    assert found == 256 + 512 + 896 + 512 + 192


def test_less_memory_is_a_smaller_patch_and_none_is_refused():
    case = [(1, 1, 1)] * 10, [(200, 200, 200)] * 10
    sizes = [Planner(2, memory_gb=gb).plan(*case).configurations["3d_fullres"].patch_size for gb in (8, 2, 0.5)]
    voxels = [a * b * c for a, b, c in sizes]
    assert voxels == sorted(voxels, reverse=True)
    assert len(set(voxels)) == 3
    with pytest.raises(ConfigError, match="gpu_memory_gb"):
        Planner(2, memory_gb=1e-6).plan(*case)
    with pytest.raises(ConfigError, match="min_batch"):
        Planner(2, min_batch=0)
    with pytest.raises(BadDataError, match="too small"):
        Planner(2).plan([(1, 1, 1)], [(5, 5, 5)])
