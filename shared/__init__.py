"""The shared room of bestiary. It is imported as `bestiary.shared`, never as `shared`."""

if __name__ != "bestiary.shared":
    raise ImportError(
        f"this package was imported as {__name__!r}; import 'bestiary.shared' instead "
        "(two names would give two copies of every class)"
    )
