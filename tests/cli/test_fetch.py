import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "fetch.py"


@pytest.fixture
def shop(tmp_path):
    """A wheel in a folder that pip takes for its index, and a manifest that pins it."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "toy_pkg-1.0-py3-none-any.whl"
    info = "toy_pkg-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as bundle:
        bundle.writestr("toy/data/a.txt", "hello")
        bundle.writestr("toy/data/deep/b.txt", "world!")
        bundle.writestr("toy/code.py", "raise SystemExit")
        bundle.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-pkg\nVersion: 1.0\n")
        bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        bundle.writestr(f"{info}/RECORD", "")
    return Shop(tmp_path, wheel)


class Shop:
    def __init__(self, folder, wheel):
        self.folder, self.wheel, self.data = folder, wheel, folder / "data"
        self.sha = hashlib.sha256(wheel.read_bytes()).hexdigest()
        self.env = {
            **os.environ,
            "BESTIARY_DATA": str(self.data),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheel.parent),
        }

    def manifest(self, **changes):
        values = {
            "kind": "pip",
            "package": "toy-pkg",
            "version": "'1.0'",
            "sha256": self.sha,
            "download_mb": 0.1,
            "licence": "CC0",
            "source": "made here",
            "strip": "toy/data",
            "files": "[toy/data/*]",
            **changes,
        }
        path = self.folder / "assets.yaml"
        path.write_text("toy:\n" + "".join(f"  {key}: {value}\n" for key, value in values.items()))
        return path

    def run(self, *names, **changes):
        command = [sys.executable, str(SCRIPT), *names, "--manifest", str(self.manifest(**changes))]
        return subprocess.run(command, capture_output=True, text=True, env=self.env, cwd=self.folder, timeout=120)

    def kept(self):
        files = [p for p in self.data.rglob("*") if p.is_file() and p.suffix != ".lock"]
        return sorted(p.relative_to(self.data).as_posix() for p in files)


def test_fetch_unpacks_only_what_is_wanted_and_once(shop):
    first = shop.run("toy")
    assert first.returncode == 0, first.stderr
    assert "ready in" in first.stdout
    assert shop.kept() == ["assets/toy/.asset.json", "assets/toy/a.txt", "assets/toy/deep/b.txt"]
    before = (shop.data / "assets/toy/a.txt").stat().st_mtime_ns
    shop.wheel.unlink()  # a second run has nothing to download
    second = shop.run("toy")
    assert second.returncode == 0
    assert "already in" in second.stdout
    assert (shop.data / "assets/toy/a.txt").stat().st_mtime_ns == before


def test_a_wrong_sha256_keeps_nothing(shop):
    done = shop.run("toy", sha256="f" * 64)
    assert done.returncode == 2
    assert shop.sha in done.stderr
    assert "Traceback" not in done.stderr
    assert shop.kept() == []


def test_a_missing_file_in_the_archive_keeps_nothing(shop):
    done = shop.run("toy", files="[toy/data/*, toy/weights.bin]")
    assert done.returncode == 2
    assert "has no toy/weights.bin" in done.stderr
    assert shop.kept() == []


def test_no_package_is_one_clear_error(shop):
    shop.wheel.unlink()
    done = shop.run("toy")
    assert done.returncode == 2
    assert "online" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2
    assert shop.kept() == []


def test_a_damaged_asset_is_fetched_again(shop):
    shop.run("toy")
    (shop.data / "assets/toy/a.txt").write_text("")
    assert "ready in" in shop.run("toy").stdout
    assert (shop.data / "assets/toy/a.txt").read_text() == "hello"


def test_an_interrupted_fetch_leaves_no_trace_in_the_next(shop):
    leftover = shop.data / "partial" / "toy" / "archive"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_text("")
    assert shop.run("toy").returncode == 0
    assert "partial/toy/archive/half.whl" not in shop.kept()


@pytest.fixture
def source(shop):
    """The shop with a source archive instead, whose setup script leaves a mark when it is run."""
    shop.wheel.unlink()
    tree = shop.folder / "toy_pkg-1.0"
    (tree / "toy").mkdir(parents=True)
    (tree / "toy" / "code.py").write_text("x = 1")
    (tree / "setup.py").write_text(
        "import pathlib, setuptools\n"
        f"pathlib.Path({str(shop.folder / 'ran')!r}).write_text('')\n"
        "setuptools.setup(name='toy-pkg', version='1.0')\n"
    )
    (tree / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: toy-pkg\nVersion: 1.0\n")
    shop.wheel = shop.wheel.parent / "toy_pkg-1.0.tar.gz"
    with tarfile.open(shop.wheel, "w:gz") as bundle:
        bundle.add(tree, "toy_pkg-1.0")
    shop.sha = hashlib.sha256(shop.wheel.read_bytes()).hexdigest()
    return shop


SOURCE = {"kind": "sdist", "strip": "toy_pkg-1.0", "files": "[toy_pkg-1.0/toy/*]"}


def test_a_source_archive_is_unpacked(source):
    pytest.importorskip("setuptools")
    done = source.run("toy", **SOURCE)
    assert done.returncode == 0, done.stderr
    assert source.kept() == ["assets/toy/.asset.json", "assets/toy/toy/code.py"]


def test_no_script_of_an_unknown_source_archive_is_run(source):
    done = source.run("toy", **SOURCE, sha256="f" * 64)
    assert done.returncode == 2
    assert f"has sha256 {source.sha}, but" in done.stderr
    assert "Traceback" not in done.stderr
    assert source.kept() == []
    assert not (source.folder / "ran").exists()


def test_list_and_unknown_names(shop):
    listed = shop.run("--list")
    assert "toy" in listed.stdout
    assert "absent" in listed.stdout
    assert "CC0" in listed.stdout
    wrong = shop.run("toys")
    assert wrong.returncode == 2
    assert "there are: toy" in wrong.stderr


def test_an_archive_cannot_write_outside_its_folder(shop, monkeypatch):
    spec = importlib.util.spec_from_file_location("bestiary_fetch_script", SCRIPT)
    fetch = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(fetch)
    with zipfile.ZipFile(shop.wheel, "w") as bundle:
        bundle.writestr("../evil.txt", "x")
    asset = fetch.load_manifest(shop.manifest(files="['*']", strip="''"))["toy"]
    with pytest.raises(fetch.UserError, match="outside"):
        fetch._unpack(asset, shop.wheel, shop.folder / "out" / "files")
    assert not (shop.folder / "out" / "evil.txt").exists()


@pytest.mark.network
@pytest.mark.slow
def test_a_debian_package_is_unpacked(tmp_path):
    env = {**os.environ, "BESTIARY_DATA": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT), "mricron_data"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "assets/mricron_data/aal.nii.gz").is_file()
    assert not (tmp_path / "assets/mricron_data/brodmann.nii.gz").exists()
