"""What every test gets: one thread, no network, no display, and the fixtures below.

Tests import nothing from `tests`: an installed package may bear that name. What they share is a fixture.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Set before torch or matplotlib load, and inherited by every subprocess.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex
_LOOPBACK = ("127.", "::1", "localhost", "::ffff:127.")


def _blocked(sock: socket.socket, address) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return not str(address[0]).startswith(_LOOPBACK)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections beyond this machine, except in tests marked `network`."""
    if request.node.get_closest_marker("network"):
        return

    def guarded(original: Callable) -> Callable:
        def connect(sock: socket.socket, address, *args):
            if _blocked(sock, address):
                raise RuntimeError(f"a test tried to reach {address}: tests run offline (mark it `network` if it must)")
            return original(sock, address, *args)

        return connect

    monkeypatch.setattr(socket.socket, "connect", guarded(_connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(_connect_ex))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Hold torch to one thread where a test module has loaded it: results are the same on every machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def clean_env() -> Callable[..., dict[str, str]]:
    """An environment for subprocesses: `clean_env(NAME="value", …)` adds to it, `NAME=None` removes.

    It carries nothing of this session's settings of bestiary, Hydra, W&B or PYTHONPATH.
    """

    def make(**changes: str | None) -> dict[str, str]:
        ours = ("BESTIARY_RUNS", "BESTIARY_KERNELS", "BESTIARY_NATIVE", "BESTIARY_ISA")
        dropped = (*ours, "PYTHONPATH", "HYDRA_FULL_ERROR", "WANDB_API_KEY")
        env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("PYTEST_")}
        env["COLUMNS"] = "120"
        for key, value in changes.items():
            if value is None:
                env.pop(key, None)
            else:
                env[key] = value
        return env

    return make


@pytest.fixture
def run_tool(tmp_path: Path, clean_env) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_tool("train", "+project=asm_unet", …)` runs tools/train.py in a subprocess.

    The working directory is the test's temporary folder unless `cwd=` says otherwise, `BESTIARY_RUNS` points into
    it, so that no run lands in the repository, and `env={…}` changes the environment further.
    """

    def run(
        name: str, *args: object, cwd: Path | None = None, timeout: float = 240, env: dict | None = None
    ) -> subprocess.CompletedProcess[str]:
        settings: dict[str, str | None] = {"BESTIARY_RUNS": str(tmp_path / "runs"), **(env or {})}
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)],
            cwd=cwd or tmp_path,
            env=clean_env(**settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def need_asset() -> Callable[[str], Path]:
    """`need_asset("icbm152")` is the asset's path; where it is missing the test is skipped with the fetch command."""

    def need(name: str) -> Path:
        from bestiary.shared.data import assets

        if not assets.is_present(name):
            pytest.skip(f"{name} is not on this machine; get it with: python tools/fetch.py {name}")
        return assets.asset_path(name)

    return need


@pytest.fixture(scope="session")
def brain_pieces(need_asset) -> Callable[..., Iterator[tuple]]:
    """`brain_pieces((x, y, z), classes)` yields ever other boxes of the ICBM152 template: image, label and affine.

    The image is the T1 in 0 to 255; the label holds all of 0 to `classes`: its tissue (CSF, grey, white matter), for
    more classes numbered by where in the box it lies. Axes are (x, y, z), 1 mm, RAS.
    """
    import nibabel as nib
    import numpy as np

    folder = need_asset("icbm152")
    t1, gm, wm = (nib.load(next(folder.glob(f"*_{kind}_tal*"))) for kind in ("t1", "gm", "wm"))
    image = np.asarray(t1.dataobj, dtype=np.float32)
    parts = [np.asarray(part.dataobj, dtype=np.float32) / 255 for part in (gm, wm)]
    tissue = np.where(image > 0, 1 + np.argmax(np.stack([1 - sum(parts), *parts]), axis=0), 0)

    def cut(size: tuple[int, int, int], classes: int = 3) -> Iterator[tuple]:
        for y in range(40, 190, 7):
            corner = (70, y, 70)
            box = tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))
            label = tissue[box].copy()
            if classes > 3:
                quarter = np.indices(size)[0] * 5 // size[0]  # five slabs of three tissues are fifteen
                label = np.where(label > 0, 1 + (label - 1 + 3 * quarter) % classes, 0)
            label[0, 0, 0] = 0
            affine = t1.affine.copy()
            affine[:3, 3] += affine[:3, :3] @ corner
            if set(np.unique(label)) == set(range(classes + 1)):
                yield image[box], label.astype(np.uint8), affine

    return cut


@pytest.fixture(scope="session")
def challenge_tree(brain_pieces) -> Callable[..., Path]:
    """`challenge_tree(folder, "acdc", "download", cases)` lays real anatomy out as a data set's files do.

    Layouts: `download`, `training` (from that folder on), `flat` and `nnunet`. For ACDC a case is a patient's number.
    """

    def lay_out(root: Path, kind: str, layout: str, cases: Sequence[int]) -> Path:
        import nibabel as nib
        import numpy as np

        size = {"acdc": (24, 28, 8), "synapse": (24, 28, 16)}[kind]
        pieces = brain_pieces(size, {"acdc": 3, "synapse": 13}[kind])
        spacing = np.diag([1, 1, 5.0 if kind == "acdc" else 2.0, 1])

        def put(image: Path, label: Path) -> None:
            values, classes, affine = next(pieces)
            if kind == "synapse":
                values = values * 4 - 400  # a range like that of HU
            for path, array in ((image, values), (label, classes)):
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, affine @ spacing), path)

        def ours(case: str) -> None:
            put(root / "imagesTr" / f"{case}_0000.nii.gz", root / "labelsTr" / f"{case}.nii.gz")

        for case in cases:
            if kind == "synapse":
                inside = {"download": "RawData/Training", "training": "Training"}.get(layout, "")
                split = ("", "") if layout == "flat" else ("img", "label")
                where = [root / inside / part for part in split]
                image, label = (f / f"{n}{case:04d}.nii.gz" for f, n in zip(where, ("img", "label"), strict=True))
                ours(f"img{case:04d}") if layout == "nnunet" else put(image, label)
                continue
            patient, frames = f"patient{case:03d}", (1, 8 + case % 5)
            part = {"download": "testing" if case > 100 else "training", "training": "training"}.get(layout, "")
            folder = root / ("database" if layout == "training" else "") / part / patient
            for frame in frames:
                name = f"{patient}_frame{frame:02d}"
                ours(name) if layout == "nnunet" else put(folder / f"{name}.nii.gz", folder / f"{name}_gt.nii.gz")
            if layout != "nnunet":
                lines = [f"ED: {frames[0]}", f"ES: {frames[1]}", "Group: DCM", "Height: 170.0", "NbFrame: 30"]
                (folder / "Info.cfg").write_text("\n".join(lines) + "\n")
                (folder / f"{patient}_4d.nii.gz").write_text("the whole series, which is not read")
        return root

    return lay_out
