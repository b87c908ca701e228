"""A server that has imported everything and forks once a command, so that running a tool takes a second, not seven.

What the child runs is the tool itself, with its own arguments, environment, working folder and signals; it can be
stopped or killed like any process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVER = r"""
import atexit, gc, json, os, runpy, sys, traceback
root = sys.argv[1]
sys.path.insert(0, root + "/src")
import hydra, lightning.pytorch, matplotlib.pyplot, peft, torch, transformers
import transformers.models.llama.modeling_llama
import bestiary.shared.core.train, bestiary.shared.core.command_line
import bestiary.projects._examples.module, bestiary.projects._examples.data
import bestiary.shared.language.hf_causal_lm, bestiary.shared.metrics.language, bestiary.shared.losses.causal_lm
gc.freeze()
print("ready", flush=True)
job = None
while job is None:
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
    else:
        job = asked
os.setsid()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
sys.argv = [job["script"], *job["args"]]
exec(job["before"], {})
code = 0
try:
    runpy.run_path(job["script"], run_name="__main__")
except SystemExit as error:
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
except BaseException:
    traceback.print_exc()
    code = 1
# As an interpreter ends, but for taking everything apart, which would take longer than most of these runs.
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


@dataclass
class Job:
    """A tool that runs. ``returncode`` is negative for a signal, as in subprocess."""

    server: Server
    pid: int
    out: Path
    err: Path
    returncode: int | None = None

    @property
    def stdout(self) -> str:
        return self.out.read_text() if self.out.is_file() else ""

    @property
    def stderr(self) -> str:
        return self.err.read_text() if self.err.is_file() else ""

    def wait_for(self, text: str, timeout: float = 90) -> None:
        """Until the tool has printed this."""
        end = time.monotonic() + timeout
        while text not in self.stdout:
            assert time.monotonic() < end, f"{text!r} was never printed:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Job:
        if self.returncode is None:
            self.returncode = int(self.server.ask({"wait": self.pid}))
        return self

    @property
    def answer(self) -> str:
        """What it said on stderr, without warnings of libraries."""
        return self.stderr.strip()


class Server:
    def __init__(self, root: Path, env: dict[str, str], factory):
        self.root, self.env, self.factory = root, env, factory
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, values: dict) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def start(self, name: str, *args: object, runs: Path | None = None, env=None, cwd=None, before: str = "") -> Job:
        """Start tools/<name>.py; ``before`` is Python that runs in its process first."""
        folder = self.factory.mktemp(name)
        values = {**self.env, "BESTIARY_RUNS": str(runs or folder / "runs"), **(env or {})}
        job = {
            "script": str(self.root / "tools" / f"{name}.py"),
            "args": [str(a) for a in args],
            "env": {k: v for k, v in values.items() if v is not None},
            "cwd": str(cwd or folder),
            "out": str(folder / "out.txt"),
            "err": str(folder / "err.txt"),
            "before": before,
        }
        return Job(self, int(self.ask(job)), folder / "out.txt", folder / "err.txt")

    def __call__(self, name: str, *args: object, **options) -> Job:
        """Run tools/<name>.py to its end."""
        return self.start(name, *args, **options).wait()


@pytest.fixture(scope="session")
def tool(root, clean_env, tmp_path_factory):
    """`tool("train", …)` runs a tool quickly; `tool.start(…)` returns while it runs. See this file's first lines."""
    server = Server(root, clean_env(BESTIARY_RUN_DIR=None, WANDB_RUN_ID=None), tmp_path_factory)
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=30)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The tutorial, small enough for a second."""
    return [
        "+project=_examples",
        "recipe.steps=6",
        "recipe.chat_steps=6",
        "recipe.batch_size=4",
        "dataset.held_out_chats=2",
        "dataset.window=64",
        "callbacks.log_every_steps=1",
        "callbacks.save_every_steps=1",
        "backbone.config.num_hidden_layers=1",
        "recipe.evaluations.text.protocol.window=64",
    ]


@pytest.fixture(scope="session")
def whole(tool, tiny, tmp_path_factory) -> Path:
    """The run folder of an unbroken run of `tiny`."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = tool("train", *tiny, f"paths.run_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def short():
    """Check that a job refused with exit code 2 in a few lines, and return them."""

    def check(job, *words: str, lines: int = 4) -> str:
        text = job.stderr.strip()
        assert job.returncode == 2, job.stdout + job.stderr
        assert "Traceback" not in text
        assert 1 <= len(text.splitlines()) <= lines, text
        for word in words:
            assert word in text, text
        return text

    return check


@pytest.fixture(scope="session")
def put():
    """`put(path, array, affine)` writes a NIfTI file whose voxels are 1 x 1 x 2 mm, and its folder."""
    import nibabel as nib
    import numpy as np

    def write(path: Path, array, affine=None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine), path)

    return write


@pytest.fixture(scope="session")
def two_blocks(put, tmp_path_factory):
    """A set in nnU-Net's layout: c0 to c4 for training, t0 for the test, 12 x 10 x 8 voxels, two blocks to find.

    Tests copy it; `image` and `label` (x, y, z) are what every case begins with.
    """
    import numpy as np

    class Blocks:
        root = tmp_path_factory.mktemp("blocks") / "good"
        label = np.zeros((12, 10, 8), np.uint8)
        label[2:6, 2:6, 2:5], label[7:10, 5:9, 3:7] = 1, 2
        image = (np.random.default_rng(0).normal(50, 9, label.shape) + 30 * label).astype(np.float32)

    for part, case in [("Tr", f"c{n}") for n in range(5)] + [("Ts", "t0")]:
        put(Blocks.root / f"images{part}" / f"{case}_0000.nii.gz", Blocks.image + len(case) + ord(case[1]) % 7)
        put(Blocks.root / f"labels{part}" / f"{case}.nii.gz", Blocks.label)
    labels = {"background": 0, "liver": 1, "spleen": 2}
    values = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
    (Blocks.root / "dataset.json").write_text(json.dumps(values))
    return Blocks


@pytest.fixture(scope="session")
def small_net() -> list[str]:
    """A plain U-Net of two levels for `two_blocks`, trained for a step; `dataset.root` is to be given."""
    return [
        *("+project=asm_unet", "backbone=none", "encoder.features=[4,8]", "encoder.convs_per_stage=1"),
        *("model.network.decoder_convs=1", "model.mirror_tta=false", "dataset=nnunet_folder"),
        *("dataset.patch_size=[8,8,8]", "dataset.spacing=[2,1,1]", "dataset.strides=[[1,1,1],[1,2,2]]"),
        *("recipe.steps=1", "recipe.batch_size=2", "recipe.num_workers=0", "callbacks.save_every_steps=1"),
        *("recipe.evaluations.volume.protocol.hd95=false", "recipe.evaluations.volume.protocol.nsd=false"),
    ]


@pytest.fixture(scope="session")
def whole_tree():
    """`whole_tree(folder)` is what lies in it, with sizes and times: equal if nothing was written or lost."""

    def look(folder: Path) -> dict[str, tuple[int, int]]:
        found = {path: path.lstat() for path in sorted(folder.rglob("*"))}
        return {str(path): (state.st_size, state.st_mtime_ns) for path, state in found.items() if path.is_file()}

    return look


@pytest.fixture(scope="session")
def as_others():
    """Python for `before`: from there on a tool run by root obeys permissions as any other user does."""
    if sys.platform != "linux":
        pytest.skip("capabilities are Linux's")
    return """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(head, sets) == 0
sets[0] &= ~0b110  # of the effective ones: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
assert libc.capset(head, sets) == 0
"""


@pytest.fixture(scope="session")
def full_disk():
    """`full_disk("module", "function", nth)` is Python for `before`: the nth call finds the disk full."""

    def text(module: str, name: str, nth: int) -> str:
        return f"""
import {module} as module
real, calls = module.{name}, []
def full(*arguments, **options):
    calls.append(1)
    if len(calls) == {nth}:
        path = next(str(a) for a in arguments if "/" in str(a) and len(str(a)) < 500)
        raise OSError(28, "No space left on device", path)
    return real(*arguments, **options)
module.{name} = full
"""

    return text
