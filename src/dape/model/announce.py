"""Registration with the Auto classes by `import dape`, without import of transformers.

Python asks the finders of `sys.meta_path` for every imported module. The finder of `dape` answers
only for the module of `AutoConfig`. The finder lets the standard finders find the module, and adds
the import of `CONFIGURATION` to the loading.

The first `DapeConfig` imports `MODELS`, since an Auto class may get the configuration next. An
earlier import fails, because the models import the Auto classes. The modules stand here by name:
`configuration` knows no model.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
CONFIGURATION, MODELS = "dape.model.configuration", "dape.model.huggingface"


class Announcement(MetaPathFinder):
    """Finds the module of `AutoConfig` as Python does, and registers `dape` after the import."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the result of the standard finders for `AutoConfig`, else None."""
        if fullname != AUTO_CONFIG:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                import_module(CONFIGURATION)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def announce() -> None:
    """Register with the Auto classes, now or at their import."""
    if AUTO_CONFIG in sys.modules:
        import_module(CONFIGURATION)
    else:
        sys.meta_path.insert(0, Announcement())


def models() -> None:
    """Register the models, at the first call."""
    import_module(MODELS)
