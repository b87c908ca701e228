"""Parameter totals of the official networks, less the parameters that the official code never uses."""

import pytest
import torch

from bestiary.projects.asm_unet.model import ASMUNet

ONE, FLAT, HALF = (1, 1, 1), (1, 2, 2), (2, 2, 2)
FIRST_FLAT = [(1, 3, 3)] + [(3, 3, 3)] * 5
CUBES = [(3, 3, 3)] * 6
ACDC = ([ONE, FLAT, HALF, HALF, FLAT, FLAT], FIRST_FLAT)
SYNAPSE = ([ONE, FLAT, HALF, HALF, HALF, FLAT], FIRST_FLAT)
CT = ([ONE, HALF, HALF, HALF, HALF, FLAT], CUBES)
UNUSED = {"plain": 0, "enc": 756_512, "lmls": 2_269_536, "enc+dec": 1_263_928}
OPTIONS = {
    "plain": {"asm_min_channels": 10_000},
    "enc": {},
    "lmls": {"per_group_stack": True},
    "enc+dec": {"asm_in_decoder": True},
}
# plan, classes, then the official totals of plain, enc, lmls and enc+dec
ROWS = {
    "acdc": (ACDC, 4, (30_377_428, 38_157_032, 48_532_744, 43_209_623)),
    "synapse-9": (SYNAPSE, 9, (30_709_133, 38_488_737, 48_864_449, 43_541_328)),
    "synapse-14": (SYNAPSE, 14, (30_713_158, 38_492_762, 48_868_474, 43_545_353)),
    "ct-40x224x192": (SYNAPSE, 9, (30_709_133, 38_488_737, 48_864_449, 43_541_328)),
    "ct-80x160x160": (CT, 9, (30_791_629, 38_571_233, 48_946_945, 43_623_824)),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("variant", OPTIONS)
def test_totals(row, variant):
    (strides, kernels), classes, totals = ROWS[row]
    with torch.device("meta"):
        net = ASMUNet(3, 1, classes, [32, 64, 128, 256, 320, 320], strides, kernels, **OPTIONS[variant])
    official = dict(zip(OPTIONS, totals, strict=True))[variant]
    assert sum(p.numel() for p in net.parameters()) == official - UNUSED[variant]


@pytest.mark.parametrize(
    ("dim", "shared", "per_group"),
    [(128, 523_525, 1_218_061), (256, 1_802_053, 4_205_517), (320, 2_727_013, 6_365_869), (512, 6_644_677, 15_513_421)],
)
def test_blocks(dim, shared, per_group):
    from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScanMamba

    inner, rank = 2 * (dim + 1), -(-(dim + 1) // 16)
    # of each of the two layers: two sets of convolution, x_proj, dt_proj, A and D
    unused = 2 * 2 * inner * (4 + 1 + rank + 32 + rank + 1 + 16 + 1)
    for official, stacks in ((shared, 1), (per_group, 3)):
        with torch.device("meta"):
            block = AdaptiveScanMamba(dim, per_group_stack=stacks == 3)
        assert sum(p.numel() for p in block.parameters()) == official - stacks * unused
