"""conf/protocol/: each file builds a protocol with a version, and says what it is; data sets name only those."""

import re

import pytest
from omegaconf import OmegaConf

from bestiary.shared.core.build import build
from bestiary.shared.core.config import conf_dir, options
from bestiary.shared.core.protocols import EvalProtocol


@pytest.mark.parametrize("name", options("protocol"))
def test_every_protocol(name):
    file = conf_dir() / "protocol" / f"{name}.yaml"
    assert file.read_text().startswith(f"# {name}: ")
    protocol = build(OmegaConf.load(file))
    assert isinstance(protocol, EvalProtocol)
    assert protocol.name
    assert protocol.version


@pytest.mark.parametrize("name", options("dataset"))
def test_a_data_set_names_protocols_that_there_are(name):
    text = (conf_dir() / "dataset" / f"{name}.yaml").read_text()
    assert set(re.findall(r"protocol=(\w+)", text)) <= set(options("protocol"))
