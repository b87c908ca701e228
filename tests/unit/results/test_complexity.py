"""The counted sizes equal those of the official code, to the last parameter."""

from __future__ import annotations

import pytest

from bestiary.projects.asm_unet import complexity
from bestiary.shared.results import tables


@pytest.fixture(scope="module")
def table(root):
    return tables.load_table(root / "projects", "asm_unet/params_flops")


ROWS = ["acdc_plain", "acdc_enc", "acdc_enc_lmls", "acdc_encdec", "synapse9_enc", "ct80_encdec"]


@pytest.mark.parametrize("name", ROWS)
def test_counts_equal_the_official_code(name, table):
    row = table.row(name)
    found = complexity.measure(**row.args)
    for metric in table.metrics:
        if row.published[metric.key] is not None:
            assert found[metric.key] == pytest.approx(row.published[metric.key], abs=metric.tolerance + 1e-6)


def test_the_published_counts_are_those_of_the_facts(table):
    # The official code's totals less what it never uses, computed here once more from the two numbers.
    totals = {"acdc_enc": (38_157_032, 756_512), "acdc_enc_lmls": (48_532_744, 2_269_536)}
    totals["acdc_encdec"] = (43_209_623, 1_263_928)
    for name, (total, unused) in totals.items():
        assert table.row(name).published["params"] == total - unused
