"""Sweep files as W&B reads them (`conf/sweeps/*.yaml`): their trials, and the command of each.

One file serves `wandb sweep` with `wandb agent`, and `tools/sweep_local.py`, which needs no account. Checked here is
what W&B would find out late, or not at all: what Hydra refuses to read, and words that would mean something else.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import UserError
from bestiary.shared.results.schema import Checker, nearest, read_yaml


class SweepError(UserError):
    """A sweep file that cannot be used. The message names the file and the place in it."""


@dataclass(frozen=True)
class Parameter:
    """One swept parameter.

    Attributes:
        name: its Hydra path, or a config group.
        distribution: W&B's name of it; ``categorical`` for a list of values, ``constant`` for one.
        options: what the distribution takes: ``values`` (and ``probabilities``), or some of ``min``, ``max``, ``mu``,
            ``sigma``, ``a``, ``b``, ``q``.
    """

    name: str
    distribution: str
    options: Mapping[str, Any]

    @property
    def logarithmic(self) -> bool:
        """Whether its values spread over orders of magnitude."""
        return "log" in self.distribution

    def grid(self) -> list[Any] | None:
        """All values in order, or None if they cannot be counted."""
        o = self.options
        if self.distribution in ("categorical", "constant"):
            return list(o["values"])
        if self.distribution == "int_uniform":
            return list(range(o["min"], o["max"] + 1))
        if self.distribution == "q_uniform":
            first, last = (round(o[key] / o["q"]) for key in ("min", "max"))
            return [_quantised(k * o["q"], o["q"]) for k in range(first, last + 1)]
        return None

    def sample(self, rng: random.Random) -> Any:
        """One value; see W&B's "distribution options" for what each name means."""
        o, kind = self.options, self.distribution
        if kind in ("categorical", "constant"):
            return rng.choices(o["values"], o.get("probabilities"))[0]
        if kind == "int_uniform":
            return rng.randint(o["min"], o["max"])
        base = kind.removeprefix("q_")
        value = _DRAW[base](o, rng)
        return _quantised(value, o["q"]) if kind.startswith("q_") else value

    def ends(self) -> tuple[Any, Any]:
        """The first and the last value, or two that lie far apart where there is no end."""
        values, o = self.grid(), self.options
        if values is not None:
            return values[0], values[-1]
        if self.distribution.removeprefix("q_") in ("normal", "log_normal", "beta"):
            return self.sample(random.Random(0)), self.sample(random.Random(1))
        ends = [_ENDS[self.distribution.removeprefix("q_")](o[key]) for key in ("min", "max")]
        return tuple(_quantised(v, o["q"]) for v in ends) if "q" in o else tuple(ends)  # type: ignore[return-value]


def _quantised(value: float, q: float) -> float | int:
    steps = round(value / q)
    return steps * q if isinstance(q, int) else float(f"{steps * q:.12g}")


def _log_uniform_values(o: Mapping[str, Any], rng: random.Random) -> float:
    # exp(log(max)) may lie a hair outside.
    return min(max(math.exp(rng.uniform(math.log(o["min"]), math.log(o["max"]))), o["min"]), o["max"])


_DRAW: dict[str, Any] = {
    "uniform": lambda o, rng: rng.uniform(o["min"], o["max"]),
    "log_uniform": lambda o, rng: math.exp(rng.uniform(o["min"], o["max"])),
    "log_uniform_values": _log_uniform_values,
    # log(1/X) is uniform between min and max.
    "inv_log_uniform": lambda o, rng: math.exp(-rng.uniform(o["min"], o["max"])),
    # log(1/X) is uniform between log(1/max) and log(1/min): X is as with log_uniform_values.
    "inv_log_uniform_values": _log_uniform_values,
    "normal": lambda o, rng: rng.gauss(o["mu"], o["sigma"]),
    "log_normal": lambda o, rng: math.exp(rng.gauss(o["mu"], o["sigma"])),
    "beta": lambda o, rng: rng.betavariate(o["a"], o["b"]),
}
_ENDS: dict[str, Any] = {
    "uniform": lambda end: end,
    "log_uniform": math.exp,
    "log_uniform_values": lambda end: end,
    "inv_log_uniform": lambda end: math.exp(-end),
    "inv_log_uniform_values": lambda end: end,
}
_QUANTISED = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")
DISTRIBUTIONS = ("constant", "categorical", "int_uniform", *_DRAW, *(f"q_{name}" for name in _QUANTISED))
"""W&B's names; ``categorical_w_probabilities`` is ``categorical`` with ``probabilities``."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Attributes:
        path: the file. name: W&B's name, or the file's.
        program: what is run. method: ``grid`` or ``random`` (or ``bayes``, which is W&B's alone).
        metric: the name under which it is logged. maximize: whether more is better.
        run_cap: most trials, or None.
        parameters: in the file's order.
        command: the list that is rendered.
    """

    path: Path
    name: str
    program: str
    method: str
    metric: str
    maximize: bool
    run_cap: int | None
    parameters: tuple[Parameter, ...]
    command: tuple[str, ...]


_TOP = {
    "program", "name", "description", "project", "entity", "method", "metric", "parameters", "command", "run_cap",
    "early_terminate",
}  # fmt: skip
_MACROS = {"env", "interpreter", "program", "args_no_hyphens"}


def read_sweep(path: Path | str) -> Sweep:
    """Read and check a sweep file.

    Raises:
        SweepError: if it is not YAML, does not follow W&B's schema, or would render what Hydra cannot read.
    """
    path = Path(path)
    check = Checker(path, SweepError)
    top = check.mapping(read_yaml(path, SweepError), "the file", _TOP, {"program", "method", "metric", "parameters"})
    method = check.text(top, "method", "the file")
    if method not in ("grid", "random", "bayes"):
        check.fail("method", f"is {method!r}{nearest(method, ['grid', 'random', 'bayes'])}")
    metric = check.mapping(top["metric"], "metric", {"name", "goal", "target"}, {"name", "goal"})
    name = check.text(metric, "name", "metric")
    if metric["goal"] not in ("maximize", "minimize"):
        check.fail("metric.goal", f"must be maximize or minimize, not {metric['goal']!r}")
    if name.startswith("test/"):
        check.fail("metric.name", f"is {name!r}: settings are chosen on the validation part, never on the test part")
    cap = top.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        check.fail("run_cap", f"must be a whole number from 1 on, not {cap!r}")
    values = check.mapping(top["parameters"], "parameters", None)
    if not values:
        check.fail("parameters", "is empty: there is nothing to sweep")
    parameters = tuple(_parameter(check, str(key), value) for key, value in values.items())
    if method == "grid":
        for parameter in parameters:
            if parameter.grid() is None:
                check.fail(
                    f"parameters.{parameter.name}", f"is {parameter.distribution}: a grid needs a list of values"
                )
    program = check.text(top, "program", "the file")
    command = _command(check, top.get("command"))
    title = check.text(top, "name", "the file", default=path.stem) or path.stem
    return Sweep(path, title, program, method, name, metric["goal"] == "maximize", cap, parameters, command)


def _command(check: Checker, command: Any) -> tuple[str, ...]:
    if not isinstance(command, list) or not command or not all(isinstance(item, str) for item in command):
        check.fail("command", "must be a list of texts: W&B's own has --key=value in it, which Hydra cannot read")
    if command[-1] != "${args_no_hyphens}":
        check.fail("command", "must end with ${args_no_hyphens}: Hydra reads key=value alone, and later beats earlier")
    for item in command:
        inner = item[2:-1] if item.startswith("${") and item.endswith("}") else None
        if inner is not None and not inner.startswith("envvar:") and inner not in _MACROS:
            check.fail("command", f"has {item!r}{nearest(inner, sorted(_MACROS))}")
    if command.count("${program}") != 1:
        check.fail("command", "must hold ${program} once")
    chosen = [item for item in command if item.startswith(("+project=", "+experiment="))]
    if len(chosen) != 1:
        check.fail("command", f"must hold one +project= (or +experiment=), and holds {len(chosen)}")
    return tuple(command)


def _parameter(check: Checker, name: str, value: Any) -> Parameter:
    where = f"parameters.{name}"
    keys = {"value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "a", "b", "q"}
    if isinstance(value, dict) and "parameters" in value:
        check.fail(where, "is nested, and would arrive as one mapping, which Hydra cannot read: name its keys by path")
    options = dict(check.mapping(value, where, keys))
    if not re.fullmatch(r"[A-Za-z_][\w./@-]*", name):
        check.fail(where, "must be a Hydra path or group without + or ~ before it: those stand in the command")
    kind = options.pop("distribution", None)
    if "value" in options:
        options["values"] = [options.pop("value")]
        kind = kind or "constant"
    if kind is None:
        whole = all(isinstance(options.get(k), int) for k in ("min", "max"))
        kind = "categorical" if "values" in options else "int_uniform" if whole else "uniform"
    kind = "categorical" if kind == "categorical_w_probabilities" else kind
    if kind not in DISTRIBUTIONS:
        check.fail(f"{where}.distribution", f"is {kind!r}{nearest(str(kind), DISTRIBUTIONS)}")
    if kind.startswith("q_"):
        options.setdefault("q", 1)
    needed = _needed(kind)
    allowed = needed | ({"probabilities"} if kind == "categorical" else set())
    check.mapping(options, where, allowed, needed)
    if "values" in needed:
        _check_values(check, where, options)
    else:
        _check_range(check, where, kind, options)
    return Parameter(name, kind, options)


def _needed(kind: str) -> set[str]:
    base = kind.removeprefix("q_")
    if kind in ("categorical", "constant"):
        return {"values"}
    ends = {"normal": {"mu", "sigma"}, "log_normal": {"mu", "sigma"}, "beta": {"a", "b"}}.get(base, {"min", "max"})
    return ends | ({"q"} if kind.startswith("q_") else set())


def _check_values(check: Checker, where: str, options: dict[str, Any]) -> None:
    for value in check.entries(options, "values"):
        if value is None:
            check.fail(where, "has the value null, which W&B passes as the word None: write the text 'null'")
        if isinstance(value, dict):
            check.fail(where, "has a mapping as a value, which Hydra cannot read: sweep a config group instead")
    odds = options.get("probabilities")
    if odds is not None:
        if not isinstance(odds, list) or len(odds) != len(options["values"]):
            check.fail(f"{where}.probabilities", "must be as many numbers as there are values")
        if min(check.number(p, f"{where}.probabilities") for p in odds) < 0 or abs(sum(odds) - 1) > 1e-6:
            check.fail(f"{where}.probabilities", f"must be from 0 to 1 and add up to 1, not to {sum(odds):g}")


def _check_range(check: Checker, where: str, kind: str, options: dict[str, Any]) -> None:
    for key, value in options.items():
        if isinstance(value, str):
            hint = ": YAML reads 1e-4 as a text, and 1.0e-4 as a number" if re.fullmatch(r"[\d.e+-]+", value) else ""
            check.fail(f"{where}.{key}", f"must be a number, not the text {value!r}{hint}")
        check.number(value, f"{where}.{key}")
    if kind == "int_uniform":
        for key in ("min", "max"):
            if options[key] != int(options[key]):
                check.fail(f"{where}.{key}", f"must be a whole number, not {options[key]!r}")
            options[key] = int(options[key])
    if "min" in options and options["min"] > options["max"]:
        check.fail(where, f"has a min above its max: {options['min']!r} and {options['max']!r}")
    if kind.endswith("_values") and options["min"] <= 0:
        check.fail(f"{where}.min", f"must be above 0, not {options['min']!r}: it is a value, not its logarithm")
    for key in ("sigma", "a", "b", "q"):
        if key in options and options[key] <= 0:
            check.fail(f"{where}.{key}", f"must be above 0, not {options[key]!r}")


def trials(sweep: Sweep, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The values of each trial: all of a grid, the last parameter fastest; of a random sweep without end.

    A random trial's value of a parameter is a function of the seed, the trial's number and the parameter's name. A
    trial whose values were there before is left out; the sweep ends when a thousand in a row were.
    """
    if sweep.method == "bayes":
        raise SweepError(
            f"{sweep.path}: method bayes chooses each trial by the results before it, and needs W&B's server "
            f"(wandb sweep {sweep.path}); without an account: method: random"
        )
    names = [parameter.name for parameter in sweep.parameters]
    if sweep.method == "grid":
        for values in itertools.product(*(parameter.grid() or [] for parameter in sweep.parameters)):
            yield dict(zip(names, values, strict=True))
        return
    seen: set[str] = set()
    fruitless = 0
    for k in itertools.count():
        values = {p.name: p.sample(random.Random(f"{seed}/{k}/{p.name}")) for p in sweep.parameters}
        fruitless = fruitless + 1 if repr(values) in seen else 0
        if fruitless > 1000:
            return
        if not fruitless:
            seen.add(repr(values))
            yield values


def corners(sweep: Sweep) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every parameter at its first value, and at its last."""
    first = {parameter.name: parameter.ends()[0] for parameter in sweep.parameters}
    return first, {parameter.name: parameter.ends()[1] for parameter in sweep.parameters}


_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


def render(command: Sequence[str], program: str, values: Mapping[str, Any], interpreter: str = "python") -> list[str]:
    """The command line of one trial, as W&B's agent renders it.

    Args:
        command: the file's list. A macro is replaced where it is the whole item; ``${envvar:NAME}`` also inside text,
            by the bare name where there is no such variable.
        program: what ``${program}`` stands for.
        values: of the trial; each is written as Python's ``str`` writes it.
        interpreter: what ``${interpreter}`` stands for; W&B has plain ``python``.
    """
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [interpreter],
        "${program}": [program],
        "${args_no_hyphens}": [f"{name}={value}" for name, value in values.items()],
    }
    expanded = [_VARIABLE.sub(lambda m: os.environ.get(m[1], m[1]), item) for item in command]
    return [word for item in expanded for word in macros.get(item, [item])]
