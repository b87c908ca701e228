"""The rungs of the sandbox: the command that shuts a Python process in, from the strongest to the weakest."""

from __future__ import annotations

import functools
import glob
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bestiary.shared.core.errors import ConfigError

NOBODY = 65534
FIRST_USER, USERS = 2_000_000_000, 100_000_000
"""Each run of a root caller has a user of its own: limits on processes are counted by user, and one run's processes
must not be another's to signal. No account has such a number."""

SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin")
"""What a Python needs of the machine, read-only; the last four are links into /usr on most of today's systems."""


@dataclass(frozen=True)
class Limits:
    """What a solution may use.

    Attributes:
        seconds: wall time from when the harness stands; the parent's clock counts. Processor time of each process has
            about the same limit.
        start_seconds: until the harness stands; more is a failure of the sandbox.
        memory_mb: address space of a process. file_mb: largest file, and the size of the scratch folder.
        processes: processes and threads at once of the user that it runs as. files: open at once. Memory that no
            address space shows (shared memory, files in memory) is not counted: no cgroup is used, so a machine that
            runs hostile code should limit the memory of the whole run from outside.
        output_bytes: of stdout and stderr each, and of one returned value; more ends the run.

    Raises:
        ConfigError: for a limit that is none.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 64
    processes: int = 16
    files: int = 64
    output_bytes: int = 1_000_000
    start_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"sandbox limits: {name} is a number above 0, not {value!r}")


@dataclass(frozen=True)
class Rung:
    """One way to shut a process in.

    Attributes:
        name: as it is recorded. strong: safe for code that a model wrote.
        about: what it does.
    """

    name: str
    strong: bool
    about: str


RUNGS = (
    Rung("nobody_bwrap", True, "bubblewrap, as a user that owns nothing"),
    Rung("root_unshare", True, "own namespaces and root folder, then a user that owns nothing"),
    Rung(
        "rlimits_nobody",
        False,
        "limits alone, as a user that owns nothing: the network and readable files are open",
    ),
    Rung("rlimits", False, "limits alone: files, the network and other processes are open"),
)


def interpreters() -> list[tuple[str, tuple[str, ...]]]:
    """Pythons to try, each with the folders it needs besides those of the system."""
    base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    home = os.path.realpath(sys.base_prefix)
    found = [(base, () if home.startswith("/usr") else (home,))]
    if os.access("/usr/bin/python3", os.X_OK):
        found.append(("/usr/bin/python3", ()))
    return found


def command(
    rung: str, limits: Limits, python: tuple[str, tuple[str, ...]], code: str, scratch: Path
) -> tuple[list[str], dict[str, str]]:
    """The command that runs a piece of Python shut in, and its environment.

    Args:
        rung: a name of :data:`RUNGS`.
        limits: resources.
        python: of :func:`interpreters`.
        code: what the interpreter runs (``-c``).
        scratch: an empty folder of the parent's, where a rung needs one.
    """
    program, folders = python
    # Not -I, which would ignore the seed of hashes: sets should have one order. The harness mends sys.path itself.
    inner = [program, "-s", "-S", "-B", "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    limited = ["prlimit", *_rlimits(limits), "--", *inner]
    user = _user()
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    root = os.geteuid() == 0
    if rung == "nobody_bwrap":
        wrapped = [*_bwrap(limits, folders), *limited]
        return [*drop, *wrapped] if root else wrapped, environment
    if rung == "root_unshare":
        dropped = [*drop, "--inh-caps=-all", "--bounding-set=-all", "--", *limited]
        # The shell stays process 1, as root: a change of user would clear its parent-death signal, and a solution that
        # is process 1 and in a session of its own would outlive the kill. When the shell dies, all in there dies.
        spaces = ["--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "--kill-child=SIGKILL"]
        script = _new_root(limits, folders, scratch)
        return [
            "setpriv",
            "--pdeathsig=KILL",
            "unshare",
            *spaces,
            "--",
            "/bin/sh",
            "-c",
            script,
            "sh",
            *dropped,
        ], environment
    if rung == "rlimits_nobody":
        return [*drop, "--", *limited], environment
    return limited, environment


def hidden(bound: Sequence[str]) -> list[str]:
    """Folders under the bound ones that may hold tests, data or this code: an empty folder lies over each."""
    own = Path(__file__).resolve().parents[3]
    found = {"/usr/src", "/usr/games", str(own)}
    for name in bound:
        for pattern in ("lib/python3*/site-packages", "lib/python3*/dist-packages", "lib/python3/dist-packages"):
            found |= {*glob.glob(f"{name}/{pattern}"), *glob.glob(f"{name}/local/{pattern}")}
    real = {os.path.realpath(name) for name in found if os.path.isdir(name)}
    roots = [os.path.realpath(name) for name in bound]
    return sorted(name for name in real if any(name.startswith(root + "/") for root in roots))


def _user() -> int:
    """A user of its own for a run, where this user namespace knows such numbers; else nobody."""
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except OSError:
        return NOBODY
    spans = [(int(first), int(count)) for first, _, count in (line.split() for line in lines)]
    known = any(first <= FIRST_USER and first + count >= FIRST_USER + USERS for first, count in spans)
    return FIRST_USER + secrets.randbelow(USERS) if known else NOBODY


def _rlimits(limits: Limits) -> list[str]:
    seconds = int(limits.seconds) + 1
    return [
        f"--as={limits.memory_mb << 20}",
        f"--cpu={seconds}:{seconds + 1}",
        f"--fsize={limits.file_mb << 20}",
        f"--nproc={limits.processes}",
        f"--nofile={limits.files}",
        "--core=0",
    ]


def _bwrap(limits: Limits, folders: Sequence[str]) -> list[str]:
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    if _can_disable_userns():  # inside one of its own a solution could mount a file system without a size
        words += ["--unshare-user", "--disable-userns"]
    words += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    for name in SYSTEM:
        if os.path.islink(name):
            words += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            words += ["--ro-bind", name, name]
    for name in folders:
        words += ["--ro-bind", name, name]
    for name in hidden((*SYSTEM, *folders)):
        words += ["--tmpfs", name, "--remount-ro", name]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(limits.file_mb << 20), "--tmpfs", "/tmp"]
    words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    for name, value in (("PATH", "/usr/bin:/bin"), ("HOME", "/tmp"), ("LANG", "C.UTF-8"), ("PYTHONHASHSEED", "0")):
        words += ["--setenv", name, value]
    return [*words, "--"]


@functools.cache
def _can_disable_userns() -> bool:
    """Bubblewrap has the option since 0.8; older ones are still used without it."""
    shown = subprocess.run(["bwrap", "--help"], capture_output=True, text=True, check=False).stdout
    return "--disable-userns" in shown


def _new_root(limits: Limits, folders: Sequence[str], scratch: Path) -> str:
    """A shell script that makes a root folder of its own, forgets the old one, and runs its arguments there."""
    lines = [
        "set -e",
        "PATH=/usr/bin:/bin:/usr/sbin:/sbin",
        "mount --make-rprivate /",
        f"mount -t tmpfs -o size=1m,mode=755 tmpfs {scratch}",
        f"cd {scratch}",
        "mkdir proc dev tmp old again",
        "mount -t proc -o nosuid,nodev,noexec proc proc",
        f"mount -t tmpfs -o size={limits.file_mb}m,nr_inodes=4096,mode=1777,nosuid,nodev tmpfs tmp",
    ]
    for name in ("null", "zero", "urandom"):
        lines += [f"touch dev/{name}", f"mount --bind /dev/{name} dev/{name}"]
    for name in (*SYSTEM, *folders):
        inside = name.lstrip("/")
        if os.path.islink(name):
            lines.append(f"ln -s {os.readlink(name)} {inside}")
        elif os.path.isdir(name):
            lines += [f"mkdir -p {inside}", f"mount --bind {name} {inside}"]
            lines.append(f"mount -o remount,bind,ro,nosuid,nodev {inside}")
    lines += [f"mount -t tmpfs -o ro,size=4k,mode=755 tmpfs {name.lstrip('/')}" for name in hidden((*SYSTEM, *folders))]
    lines += [
        "pivot_root . old",
        "cd /",
        "umount -l /old",
        "rmdir /old",
        "mount --rbind / /again",
        "mount -o remount,ro /",
        "set +e",
        # The kernel gives no user namespace, in which it could mount, to a process whose root is not its mounts' root.
        """chroot /again /bin/sh -c 'cd /tmp && exec "$@"' sh "$@\"""",
        "exit $?",
    ]
    return "\n".join(lines)


def scratch_folder() -> Path:
    """An empty folder for one run, on a path without characters that a shell reads."""
    return Path(tempfile.mkdtemp(prefix="bestiary-sandbox-", dir="/tmp" if os.path.isdir("/tmp") else None))


def tools_missing(rung: str) -> list[str]:
    """Programs that a rung needs and that are not there."""
    wanted = {
        "nobody_bwrap": ("bwrap", "prlimit", "setpriv"),
        "root_unshare": ("unshare", "setpriv", "prlimit", "mount", "pivot_root"),
        "rlimits_nobody": ("setpriv", "prlimit"),
        "rlimits": ("prlimit",),
    }[rung]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in wanted if shutil.which(name, path=path) is None]
