"""One function for every folder: the model type decides, by the projects' metafiles."""

import pytest

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.hub.load import backbone_targets, load_pretrained
from bestiary.shared.hub.nemotron_h import save_pretrained
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.language.hybrid.model import HybridLM


def test_model_types_of_the_metafiles():
    assert backbone_targets()["nemotron_h"] == "bestiary.shared.language.hybrid.model.HybridLM"


def test_the_type_decides(tmp_path):
    lm = HybridLM({"pattern": "-", "hidden_size": 8, "intermediate_size": 8})
    save_pretrained(lm, tmp_path / "ours")
    assert isinstance(load_pretrained(tmp_path / "ours"), HybridLM)
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    HFCausalLM("llama", config).lm.save_pretrained(tmp_path / "llama")
    assert isinstance(load_pretrained(tmp_path / "llama", tokenizer="byte"), HFCausalLM)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(MissingDataError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadDataError, match="JSON object"):
        load_pretrained(tmp_path)
