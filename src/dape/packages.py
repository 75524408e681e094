"""Packages that are not always installed."""

from importlib.util import find_spec


def has_package(name: str) -> bool:
    """Return whether a package is installed.

    Python also finds a mere folder of the name in the current folder, such as the folder of logs
    that wandb makes. A folder without `__init__.py` has no origin.
    """
    found = find_spec(name)
    return found is not None and found.origin is not None
