"""Errors whose message is the whole answer: the command line prints them without a traceback and exits with 2."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that does not fit: an unknown key, a missing choice, a forbidden target."""


class MissingDataError(UserError):
    """A data set or asset that is not on this machine. The message ends with how to get it."""


class MissingExtraError(UserError):
    """An optional dependency that is not installed. The message names the extra that brings it."""


class BadDataError(UserError):
    """A file that is there but cannot be used. The message names the file."""


def require(module: str, extra: str):
    """Import an optional dependency where it is used.

    Args:
        module: dotted module name, for example ``"monai.transforms"``.
        extra: the extra of bestiary that installs it, for example ``"medical"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: if it is not installed; the message names the extra.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != root:
            raise
        raise MissingExtraError(
            f"{root} is not installed. It comes with the extra '{extra}': pip install -e '.[{extra}]'"
        ) from error
