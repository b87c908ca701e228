"""From a config node to an object: the only caller of Hydra's instantiate, behind an allowlist and a signature check.

A node is a dict with ``_target_``. Its other keys are arguments; nested nodes are built first. What flows between
parts (the data's spec, the encoder, the backbone) is the *context*: a target receives those context values which
its signature names, so no config has to wire them.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from bestiary.shared.core.errors import ConfigError, MissingExtraError, UserError

ALLOWED_PREFIXES = (
    "bestiary.",
    "torch.nn.",
    "torch.optim.",
    "lightning.pytorch.",
    "monai.",
    "timm.",
    "torchmetrics.",
)
"""What ``_target_`` may name. ``BESTIARY_TARGETS=my_package.`` (comma-separated) adds a user's own packages."""

RESERVED = {"_target_", "_partial_", "kind"}
"""Keys of a node that are not arguments; ``kind`` says lm or mixer and is read by the command line alone."""


def build(node: Any, **context: Any) -> Any:
    """Build a config node and all nodes inside it.

    Args:
        node: a node (dict with ``_target_``), or a list or dict that holds nodes; anything else is returned as it is.
        **context: values passed to every target whose signature names them and whose node does not set them.

    Returns:
        The built object; with ``_partial_: true`` a ``functools.partial`` of its target.

    Raises:
        ConfigError: for a target that is not allowed or not found, an unknown key, or a missing ``???`` value.
    """
    plain = to_plain(node)
    check_node(plain)
    return _build(plain, context)


def to_plain(node: Any) -> Any:
    """OmegaConf containers as plain dicts and lists, interpolations resolved; other values unchanged."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).splitlines()[0]
        raise ConfigError(f"{key} has no value yet: give {key}=…") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).strip()) from error


def check_node(node: Any, path: str = "") -> None:
    """Check every node inside ``node`` against its target's signature, without building anything.

    Args:
        node: plain containers.
        path: where the node stands, for messages.

    Raises:
        ConfigError: as :func:`build`.
    """
    for where, values in nodes(node, path):
        check_arguments(resolve_target(values["_target_"], where), values, where)


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All dicts with ``_target_`` inside plain containers, outermost first, each with its dotted path."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield path, dict(value)
        for key, child in value.items():
            yield from nodes(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from nodes(child, f"{path}[{index}]")


def resolve_target(name: str, path: str = "") -> Any:
    """The class or function that a dotted name stands for, if it is allowed.

    Raises:
        ConfigError: if the name is outside :data:`ALLOWED_PREFIXES`, leads out of it, or does not exist.
    """
    at = f"{path}: " if path else ""
    prefixes = allowed_prefixes()
    if not isinstance(name, str) or not name.startswith(prefixes):
        raise ConfigError(f"{at}the target {name!r} is not allowed; targets begin with {', '.join(prefixes)}")
    target = _import(name, at)
    # A name such as bestiary.x.os.system starts well and leads elsewhere: look at where the object comes from.
    home = getattr(target, "__module__", None) or ""
    if inspect.ismodule(target) or not callable(target) or not f"{home}.".startswith(prefixes):
        raise ConfigError(f"{at}the target {name!r} is not a class or function of {', '.join(prefixes)}")
    return target


def allowed_prefixes() -> tuple[str, ...]:
    """The allowlist, with what ``BESTIARY_TARGETS`` adds."""
    extra = [p.strip() for p in os.environ.get("BESTIARY_TARGETS", "").split(",") if p.strip()]
    return (*ALLOWED_PREFIXES, *(p if p.endswith(".") else p + "." for p in extra))


def _import(name: str, at: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
                if error.name == parts[0]:
                    raise MissingExtraError(f"{at}{parts[0]} is not installed, and {name!r} needs it") from error
                continue
            raise
        for attribute in parts[cut:]:
            if not hasattr(target, attribute):
                hint = nearest(attribute, dir(target))
                raise ConfigError(f"{at}{module_name} has no {attribute!r}{hint}")
            target = getattr(target, attribute)
        return target
    raise ConfigError(f"{at}there is no module for the target {name!r}")


def check_arguments(target: Any, values: Mapping[str, Any], path: str = "") -> None:
    """Say which keys of a node its target does not take, and which name is nearest.

    Raises:
        ConfigError: for the first unknown key.
    """
    names, takes_any = parameters(target)
    if takes_any:
        return
    for key in values:
        if key not in RESERVED and key not in names:
            raise ConfigError(
                f"{path + ': ' if path else ''}{_label(target)} has no argument {key!r}{nearest(key, names)}"
            )


@functools.cache
def parameters(target: Any) -> tuple[tuple[str, ...], bool]:
    """Argument names of a target, and whether it takes any keyword."""
    if isinstance(target, type):  # __init__ says more than a metaclass or a generic __new__
        signature = inspect.signature(target.__init__)
        values = list(signature.parameters.values())[1:]
    else:
        values = list(inspect.signature(target).parameters.values())
    names = tuple(p.name for p in values if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return names, any(p.kind == p.VAR_KEYWORD for p in values)


def _required(target: Any, name: str) -> bool:
    parameter = inspect.signature(target).parameters.get(name)
    return parameter is not None and parameter.default is parameter.empty


def nearest(name: str, known: Any) -> str:
    """``; did you mean 'x'?`` or an empty string."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _label(target: Any) -> str:
    return getattr(target, "__qualname__", str(target))


def _build(value: Any, context: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        target = resolve_target(value["_target_"])
        arguments = {k: _build(v, context) for k, v in value.items() if k not in RESERVED}
        names, _ = parameters(target)
        arguments = {k: v for k, v in context.items() if k in names} | arguments
        for part in ("encoder", "backbone"):  # chosen as none, where the target cannot do without
            if part in arguments and arguments[part] is None and part in context and _required(target, part):
                raise ConfigError(f"{_label(target)} needs a {part}, and there is none: choose one with {part}=…")
        # Hydra resolves the name (and applies its own blocklist); the arguments are passed by us, so that modules
        # among them are neither copied nor turned into config nodes.
        factory = instantiate({"_target_": value["_target_"], "_partial_": True})
        if value.get("_partial_"):
            return functools.partial(factory, **arguments)
        try:
            return factory(**arguments)
        except UserError:
            raise
        except Exception as error:
            # A constructor's complaint about a value is the user's to mend; anything else is a bug and keeps its trace.
            if isinstance(error, TypeError | ValueError) or type(error).__name__ == "MisconfigurationException":
                reason = " ".join(str(error).split())
                raise ConfigError(f"{value['_target_']}: {reason} (HYDRA_FULL_ERROR=1 shows where)") from error
            error.add_note(f"while building {value['_target_']}")
            raise
    if isinstance(value, Mapping):
        return {k: _build(v, context) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_build(v, context) for v in value]
    return value
