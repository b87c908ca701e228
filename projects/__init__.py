"""The projects room of bestiary. It is imported as `bestiary.projects`, never as `projects`."""

if __name__ != "bestiary.projects":
    raise ImportError(
        f"this package was imported as {__name__!r}; import 'bestiary.projects' instead "
        "(two names would give two copies of every class)"
    )
