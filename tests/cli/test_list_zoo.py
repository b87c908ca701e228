"""tools/list_zoo.py: complete, quick, and without anything heavy (the last is in configs/test_house.py)."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest


def listing(run_tool, *args):
    result = run_tool("list_zoo", *args, "--json")
    assert result.returncode in (0, 1), result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def module(root):
    spec = importlib.util.spec_from_file_location("list_zoo_script", root / "tools" / "list_zoo.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def tree(tmp_path):
    """A small zoo: one file of each kind."""
    files = {
        "projects/beta/metafile.yaml": "title: B\narxiv: '1234.56789'\nstatus: works\n",
        "projects/_examples/metafile.yaml": "title: E\n",
        "projects/alpha/metafile.yaml": "title: A\n",
        "projects/beta/tables/t1.yaml": "title: Table one\nrows: [{}, {}]\n",
        "conf/encoder/vit.yaml": "# @package _global_\n# vit: a ViT: small\n_target_: x\n",
        "conf/backbone/asm.yaml": "# adaptive scan\nkind: mixer\n",
        "conf/dataset/brain.yaml": "# a brain\nasset: no_such_asset\n",
        "conf/dataset/any.yaml": "# any\nroot: ???\n",
        "conf/dataset/mri.yaml": "# an MRI\n# Get it with: python tools/fetch.py no_such_mri\n_target_: x\n",
        "conf/dataset/own.yaml": "# your own\nroot: ${paths.data}/own\nrequest: |\n  ask\n",
        "conf/dataset/toy.yaml": "# generated\n_target_: x\n",
        "conf/recipe/sft.yaml": "key: 1  # not a description\n",
        "conf/experiment/beta/row1.yaml": "# @package _global_\n# python tools/train.py +experiment=beta/row1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_everything_is_read(module, tree, monkeypatch):
    monkeypatch.setenv("BESTIARY_DATA", str(tree / "data"))
    found = module.zoo(tree)
    assert [e["name"] for e in found["projects"]] == ["alpha", "beta", "_examples"]
    assert found["projects"][1]["arxiv"] == "1234.56789"
    assert found["encoders"][0]["about"] == "a ViT: small"
    assert found["backbones"][0]["kind"] == "mixer"
    assert found["recipes"][0]["about"] == ""
    assert found["tables"][0] | {"select": ""} == {"name": "beta/t1", "about": "Table one", "rows": 2, "select": ""}
    assert found["experiments"][0]["select"] == "+experiment=beta/row1"
    assert "beta" in module.show(found)


def test_datasets_say_how_to_get_them(module, tree, monkeypatch):
    monkeypatch.setenv("BESTIARY_DATA", str(tree / "data"))
    any_, brain, mri, own, toy = module.zoo(tree, ("datasets",))["datasets"]
    assert (brain["present"], brain["get"]) == (False, "python tools/fetch.py no_such_asset")
    assert (any_["present"], any_["get"]) == (False, "your own: set dataset.root")
    assert (mri["present"], mri["get"]) == (False, "python tools/fetch.py no_such_mri")
    assert own["get"] == f"put your copy in {tree / 'data' / 'data' / 'own'}; how to request it: conf/dataset/own.yaml"
    assert (toy["present"], toy["get"]) == (True, None)
    (tree / "data" / "data" / "own").mkdir(parents=True)
    assert module.zoo(tree, ("datasets",), ["own"])["datasets"][0]["present"]


def test_patterns(module, tree):
    assert [e["name"] for e in module.zoo(tree, patterns=["be*"])["projects"]] == ["beta"]
    assert [e["name"] for e in module.zoo(tree, patterns=["beta"])["tables"]] == ["beta/t1"]
    assert not any(module.zoo(tree, patterns=["zzz*"]).values())


def test_the_committed_zoo(run_tool, root):
    found = listing(run_tool)
    assert {e["name"] for e in found["projects"]} == {p.parent.name for p in root.glob("projects/*/metafile.yaml")}
    assert all(entry["about"] for entries in found.values() for entry in entries), found
    assert {e["kind"] for e in found["backbones"]} <= {"lm", "mixer", None}
    assert list(listing(run_tool, "asm_unet", "--kind", "tables")) == ["tables"]


def test_nothing_found_is_one(run_tool):
    result = run_tool("list_zoo", "no_such_name")
    assert result.returncode == 1
    assert "nothing is called no_such_name" in result.stdout


def test_a_broken_file_gets_a_short_answer(module, tree, monkeypatch, capsys):
    (tree / "projects" / "beta" / "metafile.yaml").write_text("title: [\n")
    monkeypatch.setattr(module, "ROOT", tree)
    assert module.main([]) == 2
    assert "metafile.yaml: not valid YAML" in capsys.readouterr().err


def test_it_answers_at_once(run_tool):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run_tool("list_zoo")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
