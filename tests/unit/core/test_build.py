"""From a config node to an object: what is allowed, what is injected, what is said."""

import functools
import sys
import types

import pytest
import torch
from omegaconf import OmegaConf

from bestiary.shared.core.build import allowed_prefixes, build, check_node, nodes, resolve_target, to_plain
from bestiary.shared.core.errors import ConfigError, MissingExtraError, UserError, require

LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "shutil.rmtree",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "hydra.utils.instantiate",
        # Names that begin well and lead elsewhere.
        "bestiary.shared.core.command_line.os.system",
        "bestiary.shared.core.runs.subprocess.run",
        "bestiary.shared.core.build.importlib.import_module",
        "bestiary.shared.core.checkpoint.torch.load",
        "bestiary.shared.core.build.instantiate",
        "torch.nn.modules.module.torch.load",
        "torch.nn.modules.module.functools.partial",
        "torch.optim.optimizer.torch.hub.load",
        "lightning.pytorch.trainer.trainer.os.system",
        # Not a class or function.
        "bestiary.shared.core",
        "bestiary.shared.core.build.ALLOWED_PREFIXES",
        "torch.nn",
        "bestiary",
        "",
        "torch.nn.",
        ".os.system",
        None,
        3,
    ],
)
def test_targets_that_are_refused(target):
    with pytest.raises(UserError):
        build({"_target_": target})
    # Nested as well, and before anything around it is made.
    with pytest.raises(UserError):
        build({"_target_": "torch.nn.Sequential", "a": [{"deep": {"_target_": target}}]})


def test_a_refused_target_was_not_called(tmp_path):
    mark = tmp_path / "called"
    for name in ("os.system", "bestiary.shared.core.command_line.os.system"):
        with pytest.raises(UserError):
            build({"_target_": name, "command": f"touch {mark}"})
    assert not mark.exists()


def test_what_is_allowed():
    assert resolve_target("torch.optim.AdamW") is torch.optim.AdamW
    layer = build(LINEAR)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (2, 3)


def test_own_targets_are_allowed_by_the_environment(monkeypatch):
    module = types.ModuleType("my_models")

    def make(width=1):
        return ("made", width)

    make.__module__ = "my_models"
    module.make = make
    monkeypatch.setitem(sys.modules, "my_models", module)
    with pytest.raises(ConfigError, match="not allowed"):
        build({"_target_": "my_models.make"})
    monkeypatch.setenv("BESTIARY_TARGETS", "other., my_models")
    assert build({"_target_": "my_models.make", "width": 4}) == ("made", 4)
    assert "my_models." in allowed_prefixes()
    # A prefix ends at a dot: it does not let a namesake in.
    with pytest.raises(ConfigError, match="not allowed"):
        build({"_target_": "my_models_of_another.make"})


class Takes:
    def __init__(self, spec, width=1, child=None, backbone=None):
        self.spec, self.width, self.child, self.backbone = spec, width, child, backbone


@pytest.fixture
def here(monkeypatch):
    """Makes the classes of this module targets."""
    module = types.ModuleType("here_targets")
    for thing in (Takes, takes_any, needs_an_extra):
        monkeypatch.setattr(thing, "__module__", "here_targets")
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "here_targets", module)
    monkeypatch.setenv("BESTIARY_TARGETS", "here_targets")


def takes_any(**values):
    return values


def needs_an_extra():
    return require("a_package_that_is_not_there.sub", "medical")


@pytest.mark.usefixtures("here")
def test_context_goes_to_what_names_it():
    spec, backbone = object(), torch.nn.Linear(1, 1)
    node = {"_target_": "here_targets.Takes", "child": {"_target_": "here_targets.Takes", "width": 2}}
    built = build(node, spec=spec, backbone=backbone, encoder="unused")
    assert built.spec is spec
    assert built.backbone is backbone  # the very object, not a copy
    assert built.child.spec is spec
    assert (built.width, built.child.width) == (1, 2)
    # What the node says is stronger than the context; a target that takes anything is given nothing unasked.
    assert build({**node, "spec": "own"}, spec=spec).spec == "own"
    assert build({"_target_": "here_targets.takes_any", "a": 1}, spec=spec) == {"a": 1}
    # Context reaches functions that name it and no other argument of torch's classes.
    assert build(LINEAR, spec=spec, bias=None).bias is None


@pytest.mark.usefixtures("here")
def test_lists_dicts_and_plain_values():
    node = {"_target_": "here_targets.Takes", "spec": None, "child": {"layers": [LINEAR, 5, "x", {"deep": LINEAR}]}}
    child = build(node).child
    assert isinstance(child["layers"][0], torch.nn.Linear)
    assert child["layers"][1:3] == [5, "x"]
    assert isinstance(child["layers"][3]["deep"], torch.nn.Linear)
    assert build([1, {"a": None}]) == [1, {"a": None}]
    assert build(None) is None
    assert build("text") == "text"
    # Plain containers arrive as such: not as OmegaConf's.
    assert type(build(OmegaConf.create({"a": [1, 2]}))["a"]) is list


def test_partial():
    make = build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.25})
    assert isinstance(make, functools.partial)
    assert make([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.25


def test_kind_is_no_argument():
    assert isinstance(build({**LINEAR, "kind": "lm"}), torch.nn.Linear)


def test_an_unknown_argument_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"backbone\.child\[1\]: Linear has no argument 'in_featurs'; did you mean 'in_features'"
    ):
        check_node({"child": [1, {"_target_": "torch.nn.Linear", "in_featurs": 2}]}, "backbone")
    with pytest.raises(ConfigError, match=r"has no argument 'zzz'$"):
        build({**LINEAR, "zzz": 1})
    with pytest.raises(ConfigError, match="has no 'Linaer'; did you mean 'Linear'"):
        build({"_target_": "torch.nn.Linaer"})
    with pytest.raises(ConfigError, match="no 'nothing_of_it'"):
        build({"_target_": "bestiary.shared.core.nothing_of_it.Thing"})


def test_a_misspelt_argument_is_found_before_anything_is_built(monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *a, **k: made.append(1))
    with pytest.raises(ConfigError):
        build([LINEAR, {"_target_": "torch.nn.Dropout", "q": 1}])
    assert made == []


def test_a_value_that_is_missing():
    node = OmegaConf.create({"data": {"_target_": "torch.nn.Linear", "in_features": "???", "out_features": 1}})
    with pytest.raises(ConfigError, match=r"data\.in_features has no value yet: give data\.in_features="):
        build(node.data)


def test_an_interpolation_that_leads_nowhere():
    with pytest.raises(ConfigError, match="nowhere"):
        to_plain(OmegaConf.create({"a": "${nowhere}"}))


@pytest.mark.usefixtures("here")
def test_a_missing_extra_is_named():
    with pytest.raises(
        MissingExtraError, match=r"a_package_that_is_not_there.*'medical'.*pip install -e '\.\[medical\]'"
    ):
        build({"_target_": "here_targets.needs_an_extra"})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setenv("BESTIARY_TARGETS", "a_package_that_is_not_there")
    with pytest.raises(MissingExtraError, match="a_package_that_is_not_there is not installed"):
        build({"_target_": "a_package_that_is_not_there.Model"})


def test_a_wrong_value_is_answered_in_words_and_a_bug_keeps_its_trace(monkeypatch):
    with pytest.raises(ConfigError, match=r"torch\.nn\.Linear: .*HYDRA_FULL_ERROR"):
        build({"_target_": "torch.nn.Linear", "in_features": "many", "out_features": 1})

    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("torch.nn.Linear.reset_parameters", broken)
    with pytest.raises(RuntimeError) as caught:
        build({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1})
    assert "while building torch.nn.Linear" in caught.value.__notes__


def test_require_lets_other_import_errors_through(tmp_path, monkeypatch):
    (tmp_path / "half_a_package.py").write_text("import another_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_that_is_not_there"):
        require("half_a_package", "zoo")


def test_nodes_are_listed_outermost_first():
    tree = {"a": {"_target_": "x", "b": [{"_target_": "y"}, {"c": {"_target_": "z"}}]}}
    assert [(where, node["_target_"]) for where, node in nodes(tree)] == [
        ("a", "x"),
        ("a.b[0]", "y"),
        ("a.b[1].c", "z"),
    ]
