import json
import subprocess
import sys

import pytest

from bestiary.shared.core.errors import ConfigError, MissingDataError
from bestiary.shared.data import assets

MANIFEST = """
toy:
  about: a toy
  kind: pip
  package: toy-pkg
  version: 1.0
  sha256: abc
  download_mb: 0.1
  licence: CC0
  source: made here
  files: [toy/*.txt]
  {extra}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(assets, "manifest_path", lambda: tmp_path / "assets.yaml")
    (tmp_path / "assets.yaml").write_text(MANIFEST.format(extra="into: assets"))
    return tmp_path


def unpacked(folder, sha="abc"):
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("hello")
    (folder / assets.RECORD).write_text(json.dumps({"sha256": sha, "files": {"a.txt": 5}}))


def test_a_missing_asset_names_the_command(home):
    assert not assets.is_present("toy")
    with pytest.raises(MissingDataError, match=r"python tools/fetch\.py toy$"):
        assets.asset_path("toy")
    assert "absent" in assets.describe("toy")


def test_present_means_the_pinned_archive_and_whole_files(home):
    folder = home / "data" / "assets" / "toy"
    unpacked(folder)
    assert assets.asset_path("toy") == folder
    assert "present" in assets.describe("toy")
    (folder / "a.txt").write_text("hell")
    assert not assets.is_present("toy")


def test_another_archive_is_not_the_asset(home):
    unpacked(home / "data" / "assets" / "toy", sha="def")
    assert not assets.is_present("toy")


@pytest.mark.parametrize("record", ["", "[]", '{"sha256": "abc"}', '{"sha256": "abc", "files": []}'])
def test_a_damaged_record_is_absence(home, record):
    unpacked(home / "data" / "assets" / "toy")
    (home / "data" / "assets" / "toy" / assets.RECORD).write_text(record)
    assert not assets.is_present("toy")


def test_code_packages_are_appended_to_the_path(home, monkeypatch):
    (home / "assets.yaml").write_text(MANIFEST.format(extra="into: site"))
    folder = home / "data" / "site" / "toy-pkg-1.0"
    unpacked(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert assets.add_site("toy") == folder
    assert assets.add_site("toy") == folder
    assert sys.path[-1] == str(folder)
    assert sys.path.count(str(folder)) == 1


def test_data_is_not_imported(home):
    with pytest.raises(ConfigError, match="is data"):
        assets.add_site("toy")


def test_unknown_names_and_fields_are_said(home):
    with pytest.raises(ConfigError, match="there are: toy"):
        assets.asset_path("toys")
    (home / "assets.yaml").write_text(MANIFEST.format(extra="sha265: x"))
    with pytest.raises(ConfigError, match="sha265"):
        assets.load_manifest()


def test_kinds_are_known(home):
    for kind in ("pip", "sdist", "apt"):
        (home / "assets.yaml").write_text(MANIFEST.format(extra="").replace("kind: pip", f"kind: {kind}"))
        assert assets.get_asset("toy").kind == kind
    (home / "assets.yaml").write_text(MANIFEST.format(extra="").replace("kind: pip", "kind: git"))
    with pytest.raises(ConfigError, match="needs kind pip, sdist or apt"):
        assets.load_manifest()


def test_the_manifest_of_the_repository_is_complete():
    for asset in assets.load_manifest().values():
        assert len(asset.sha256[0]) == 64, asset.name
        assert asset.licence, asset.name
        assert asset.source, asset.name
        assert asset.download_mb > 0, asset.name


def test_assets_need_no_torch():
    code = "import sys, bestiary.shared.data.assets as a; a.load_manifest(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
