"""metrics.csv grows by rows and columns; W&B never stops a run."""

import csv
import sys
import types

import pytest

from bestiary.shared.core.loggers import MetricsFile, WandbLog, wandb_mode

OPTIONS = {"project": "p", "entity": None, "id": None, "tags": [], "mode": "auto"}


def rows(file):
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


def test_columns_grow(tmp_path):
    file = tmp_path / "metrics.csv"
    log = MetricsFile(file)
    log.log("a", 1, {"train/loss": 0.5})
    log.log("a", 2, {"train/loss": 1 / 3})
    log.log("a", 2, {"val/dice": 0.25})
    log.log("b", 1, {"train/loss": 1e-9, "new": 7})
    assert rows(file) == [
        {"stage": "a", "step": "1", "train/loss": "0.5", "val/dice": "", "new": ""},
        {"stage": "a", "step": "2", "train/loss": "0.33333333", "val/dice": "0.25", "new": ""},
        {"stage": "b", "step": "1", "train/loss": "1e-09", "val/dice": "", "new": "7"},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_opened_again_it_goes_on(tmp_path):
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"

    def write(log, stage, first, last):
        for step in range(first, last + 1):
            log.log(stage, step, {"loss": step / 7})
            if step % 3 == 0:
                log.log(stage, step, {"val": step / 9})

    log = MetricsFile(whole)
    write(log, "a", 1, 9)
    write(log, "b", 1, 6)
    log = MetricsFile(broken)
    write(log, "a", 1, 9)
    write(log, "b", 1, 4)
    log = MetricsFile(broken)
    log.rewind("b", 2)
    assert [(r["stage"], r["step"]) for r in rows(broken)][-2:] == [("b", "1"), ("b", "2")]
    write(log, "b", 3, 6)
    assert broken.read_bytes() == whole.read_bytes()


def test_rewind_spares_other_stages(tmp_path):
    log = MetricsFile(tmp_path / "m.csv")
    for stage in ("a", "b"):
        for step in (1, 2, 3):
            log.log(stage, step, {"x": 1})
    log.rewind("b", 0)
    assert [r["stage"] for r in rows(tmp_path / "m.csv")] == ["a"] * 3
    MetricsFile(tmp_path / "none.csv").rewind("a", 0)
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("tail", ["a,3", "a,30.5", "a,", "a", "a,3,0.2"])
def test_a_line_without_its_end_is_dropped(tmp_path, tail):
    file = tmp_path / "m.csv"
    log = MetricsFile(file)
    log.log("a", 29, {"x": 0.5})
    whole = file.read_bytes()
    file.write_bytes(whole + tail.encode())
    log = MetricsFile(file)
    assert file.read_bytes() == whole
    log.log("a", 30, {"x": 0.25})
    assert [r["step"] for r in rows(file)] == ["29", "30"]


def test_values_that_are_not_finite(tmp_path):
    log = MetricsFile(tmp_path / "m.csv")
    log.log("a", 1, {"x": float("nan"), "y": float("inf")})
    assert rows(tmp_path / "m.csv")[0]["x"] == "nan"
    assert MetricsFile(tmp_path / "m.csv").rows[0]["y"] == "inf"


@pytest.fixture
def bare(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_mode(bare, monkeypatch):
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("online") == "online"
    bare.write_text("machine github.com login x")
    assert wandb_mode("auto") == "offline"
    bare.write_text("machine api.wandb.ai login user password x")
    assert wandb_mode("auto") == "online"
    bare.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("offline") == "offline"


class FakeRun:
    def __init__(self, fails=()):
        self.logged, self.fails = [], fails

    def log(self, values):
        if "log" in self.fails:
            raise ConnectionError("the network is gone\nand more")
        self.logged.append(values)

    def finish(self):
        if "finish" in self.fails:
            raise ConnectionError("gone")


def fake(monkeypatch, run=None, error=None):
    asked = {}

    def init(**options):
        asked.update(options)
        if error:
            raise error
        return run

    module = types.SimpleNamespace(init=init, Settings=lambda **k: k)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return asked


def test_what_wandb_is_told(bare, monkeypatch, tmp_path, capsys):
    run = FakeRun()
    asked = fake(monkeypatch, run)
    monkeypatch.setenv("WANDB_RUN_ID", "swept")
    log = WandbLog(OPTIONS, tmp_path, "name", {"a": 1})
    log.log("text", 3, {"loss": 0.5})
    log.finish()
    assert (asked["id"], asked["mode"], asked["config"], asked["dir"]) == ("swept", "offline", {"a": 1}, str(tmp_path))
    assert run.logged == [{"stage": "text", "stage_step": 3, "loss": 0.5}]
    assert capsys.readouterr().out.splitlines() == ["W&B: no credentials, logging offline; `wandb sync` sends it later"]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("fails", [("log",), ("finish",), ("log", "finish")])
def test_wandb_that_breaks_later(monkeypatch, tmp_path, capsys, fails):
    fake(monkeypatch, FakeRun(fails))
    log = WandbLog({**OPTIONS, "mode": "offline"}, tmp_path, "name", {})
    for step in range(3):
        log.log("text", step, {})
    log.finish()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("W&B is left out of this run: ")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("error", [RuntimeError("no\nnumber"), OSError(), ValueError("")])
def test_wandb_that_does_not_begin(monkeypatch, tmp_path, capsys, error):
    fake(monkeypatch, error=error)
    log = WandbLog({**OPTIONS, "mode": "offline"}, tmp_path, "name", {})
    log.log("text", 1, {})
    log.finish()
    assert capsys.readouterr().out.startswith("W&B is left out of this run")


@pytest.mark.usefixtures("bare")
def test_wandb_that_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    WandbLog({**OPTIONS, "mode": "offline"}, tmp_path, "name", {}).log("a", 1, {})
    assert "pip install -e '.[wandb]'" in capsys.readouterr().out
