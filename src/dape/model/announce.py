"""How transformers' Auto classes come to know `dape` by `import dape`, which imports neither.

Python asks the finders of `sys.meta_path` for each module it imports. Ours answers for one alone,
that of `AutoConfig`: it lets the others find it, and adds to its loading the import of
`DapeConfig`, which registers itself.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class Announcement(MetaPathFinder):
    """Finds the module of `AutoConfig` as Python would, with `dape` registered once it is run."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return what the other finders find; None, which is no answer, for other modules."""
        if fullname != AUTO_CONFIG:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                import_module("dape.model.configuration")

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def announce() -> None:
    """Register with the Auto classes: now if they are there, else when they are imported."""
    if AUTO_CONFIG in sys.modules:
        import_module("dape.model.configuration")
    else:
        sys.meta_path.insert(0, Announcement())
