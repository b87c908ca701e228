"""The C++ kernels' shared library: found, or built by one call of the compiler, or refused with the remedy.

In this order: a prebuilt library in the package (wheels have one for each instruction set), one in the cache, one
built now under a file lock and renamed into the cache, else a reason why not, which is said once.

``BESTIARY_NATIVE=auto|require|off`` asks for the library, insists on it, or does without.
``BESTIARY_ISA=avx512|avx2|portable`` picks an instruction set instead of the best that this machine has.
``BESTIARY_CACHE`` is the folder for built libraries, ``~/.cache/bestiary`` by default; ``CXX`` names the compiler.

``python -m bestiary.kernels.backends [--isa NAME|all] [--out FOLDER]`` builds ahead: CI, images, wheels.
This module imports torch only when a library is built or loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ENV, ENV_ISA, ENV_CACHE = "BESTIARY_NATIVE", "BESTIARY_ISA", "BESTIARY_CACHE"

_PACKAGE = Path(__file__).absolute().parents[1]
SOURCES = _PACKAGE / "csrc"
PREBUILT = _PACKAGE / "csrc" / "lib"

# The oldest libtorch whose stable ABI has what the code calls; a library built for it loads in every later one.
_COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast",
           "-DTORCH_TARGET_VERSION=0x020a000000000000")  # fmt: skip
# Never -march=native: on a virtual machine it can name another processor than the one that loads the file later.
_ISA_FLAGS = {"avx512": ("-march=x86-64-v4",), "avx2": ("-march=x86-64-v3",), "portable": ()}
_LANES = {"avx512": 16, "avx2": 8, "portable": 4}

_namespaces: dict[str, Any] = {}
_reasons: dict[str, str] = {}


class BuildError(RuntimeError):
    """The library could not be built; the message is one line and names the remedy."""


def setting() -> str:
    """What ``BESTIARY_NATIVE`` says: auto, require or off.

    Raises:
        ValueError: if it says anything else.
    """
    value = os.environ.get(ENV) or "auto"
    if value not in ("auto", "require", "off"):
        raise ValueError(f"{ENV}={value} is not known; there are auto, require, off")
    return value


def _x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def isas() -> tuple[str, ...]:
    """The instruction sets this machine can run, best first."""
    if not _x86():
        return ("portable",)
    import torch

    capability = str(torch.backends.cpu.get_cpu_capability()).upper()
    if capability.startswith("AVX512"):
        return ("avx512", "avx2", "portable")
    return ("avx2", "portable") if capability.startswith("AVX2") else ("portable",)


def isa() -> str:
    """The instruction set in use.

    Raises:
        ValueError: if ``BESTIARY_ISA`` names one that this machine has not.
    """
    have = isas()
    asked = os.environ.get(ENV_ISA)
    if asked and asked not in have:
        raise ValueError(f"{ENV_ISA}={asked}: this machine runs {', '.join(have)}")
    return asked or have[0]


def lanes() -> int:
    """Channels that the kernels of the instruction set in use take at once."""
    return _LANES[isa()]


def why_absent() -> str | None:
    """None if the C++ kernels can run here (building them if need be), else the reason.

    Raises:
        BuildError: under ``BESTIARY_NATIVE=require``, if they cannot.
        ValueError: if the environment asks for something unknown.
    """
    how = setting()
    if how == "off":
        return f"{ENV}=off"
    try:
        ops()
    except BuildError as error:
        if how == "require":
            raise
        return str(error)
    return None


def ops() -> Any:
    """The raw C++ ops of the instruction set in use, loading or building the library first.

    Raises:
        BuildError: if there is none and none can be built. Said as a warning once; the reason is kept.
    """
    # called once per op: no work but a dictionary access after the first time
    key = os.environ.get(ENV_ISA) or ""
    found = _namespaces.get(key)
    if found is None:
        if key in _reasons:
            raise BuildError(_reasons[key])
        try:
            found = _namespaces[key] = _load()
        except BuildError as error:
            _reasons[key] = str(error)
            if setting() == "auto":
                warnings.warn(f"bestiary runs its slow PyTorch kernels: {error}", RuntimeWarning, stacklevel=2)
            raise
    return found


def _load() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"torch cannot be imported ({error})") from error
    name = isa()
    try:
        torch.ops.load_library(str(library(name)))
    except OSError as error:
        text = str(error).splitlines()[0]
        raise BuildError(
            f"the library does not load ({text}); delete {cache_folder()} and start again, or set {ENV}=off"
        ) from error
    return getattr(torch.ops, f"bestiary_{name}")


def library(name: str) -> Path:
    """The library for an instruction set: prebuilt, cached, or built now.

    Raises:
        BuildError: if there is none and none can be built.
    """
    file = f"bestiary_{name}.so"
    if (PREBUILT / file).exists():
        return PREBUILT / file
    cached = cache_folder() / f"{_fingerprint(name)}" / file
    return cached if cached.exists() else build(name, cached)


def cache_folder() -> Path:
    """Where built libraries are kept.

    Raises:
        BuildError: if this user has no home folder and ``BESTIARY_CACHE`` names none.
    """
    try:
        return Path(os.environ.get(ENV_CACHE) or "~/.cache/bestiary").expanduser() / "native"
    except RuntimeError as error:
        raise BuildError(f"no home folder to build into; set {ENV_CACHE} to a folder that can be written") from error


def compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, else the first of c++, g++ and clang++.

    Raises:
        BuildError: if there is none.
    """
    asked = os.environ.get("CXX")
    if asked:
        words = shlex.split(asked)
        if words and shutil.which(words[0]):
            return words
        raise BuildError(f"CXX={asked} is not found; unset it, or name a C++17 compiler")
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found; install one (Debian: apt-get install g++), or a wheel with the library")


def build(name: str, target: Path) -> Path:
    """Compile the library for one instruction set, one compiler call, and put it at ``target``.

    Of several processes one builds and the others wait; the file appears whole or not at all.

    Raises:
        BuildError: if the compiler is missing or fails, or the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock")):
            if target.exists():
                return target
            command = compiler()
            print(f"bestiary: building the C++ kernels ({name}) once, into {target.parent}", file=sys.stderr)
            for left in target.parent.glob(f"{target.stem}.*.part"):  # by a build that was killed
                left.unlink(missing_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f"{target.stem}.", suffix=".part")
            os.close(handle)
            try:
                _compile([*command, *_flags(name), "-o", temporary], target.with_suffix(".log"))
                os.chmod(temporary, 0o755)
                os.replace(temporary, target)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)
    except OSError as error:
        remedy = f"set {ENV_CACHE} to a folder that can be written"
        raise BuildError(f"cannot write {target.parent} ({error.strerror}); {remedy}") from error
    return target


def _compile(command: list[str], log: Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower()]
        lines = lines or [f"exit status {result.returncode}"]
        log.write_text(shlex.join(command) + "\n" + result.stderr)
        raise BuildError(f"{command[0]} failed: {lines[0][:200]} (all in {log}); set CXX to a C++17 compiler")


def _flags(name: str) -> list[str]:
    import torch

    home = Path(torch.__file__).parent
    flags = [*_COMMON, *(_ISA_FLAGS[name] if _x86() else ()), f"-DBESTIARY_NAMESPACE=bestiary_{name}"]
    flags += [f"-DBESTIARY_LANES={_LANES[name]}", f"-I{home / 'include'}", str(SOURCES / "bestiary_cpu.cpp")]
    if sys.platform == "darwin":
        return [*flags, "-undefined", "dynamic_lookup"]
    return [*flags, f"-L{home / 'lib'}", "-ltorch_cpu", "-Wl,--as-needed"]


def _fingerprint(name: str) -> str:
    """Of what the library is made from: sources, flags, compiler and machine; torch's version is no part of it."""
    digest = hashlib.sha256(repr((_COMMON, _ISA_FLAGS[name], _LANES[name], platform.machine())).encode())
    digest.update((os.environ.get("CXX") or "").encode())
    for path in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class _lock:
    """A file lock between processes, released when the holder dies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.file = open(self.path, "w")
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # no fcntl, or a disk without locks: two builds at once only cost time
            pass

    def __exit__(self, *_: object) -> None:
        self.file.close()


def main(arguments: list[str] | None = None) -> int:
    """Build the library; see the module's docstring."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m bestiary.kernels.backends", description="Build the kernels")
    choices = [*_ISA_FLAGS, "all"]
    parser.add_argument("--isa", choices=choices, action="append", help="the one in use here, or all of this processor")
    parser.add_argument("--out", type=Path, help="a folder to put bestiary_<isa>.so in; default: the cache")
    options = parser.parse_args(arguments)
    try:
        asked = options.isa or [isa()]
        for name in (_ISA_FLAGS if _x86() else ("portable",)) if "all" in asked else asked:
            print(build(name, options.out / f"bestiary_{name}.so") if options.out else library(name))
    except (BuildError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
