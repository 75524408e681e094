"""What every process of the tests does first: Python reads this file as it starts."""

import atexit
import gc
import importlib.metadata
import json
import os
import pickle
import shutil
import sys
import tempfile
from importlib.machinery import PathFinder

# Imports make many objects and no garbage, and a fifth of their time went into looking for some.
gc.set_threshold(100_000)
# lm-eval installs scikit-learn. Where it is, transformers imports it, which takes a second or two.
sys.modules["sklearn"] = None
# transformers asks for the packages of all distributions, which the first process has read.
if "TEST_PACKAGES" in os.environ:
    importlib.metadata.packages_distributions = lambda: json.loads(os.environ["TEST_PACKAGES"])
else:
    os.environ["TEST_PACKAGES"] = json.dumps(importlib.metadata.packages_distributions())


class Reader:
    """Let the first process alone read which names the files of transformers have, and once."""

    module = "transformers.utils.import_utils"

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.create_import_structure_from_path = _kept(
                module.create_import_structure_from_path
            )

        spec.loader.exec_module = exec_module
        return spec


def _kept(read):
    """Return `read` of a folder, which keeps the names below `models` in a file."""
    file = os.path.join(os.environ["TEST_NAMES"], "names")

    def names(path):
        folder = os.path.abspath(path).removesuffix(f"{os.sep}__init__.py")
        if os.path.basename(folder) != "models":
            return read(path)
        if not os.path.exists(file):
            part = f"{file}-{os.getpid()}"
            with open(part, "wb") as stream:
                pickle.dump(read(folder), stream)
            os.replace(part, file)
        with open(file, "rb") as stream:
            return pickle.load(stream)

    return names


def _remove(folder, owner):
    """Remove a folder at the end of the process that made it, and not of one forked from it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


if "TEST_NAMES" not in os.environ:
    os.environ["TEST_NAMES"] = tempfile.mkdtemp(prefix="tests-")
    atexit.register(_remove, os.environ["TEST_NAMES"], os.getpid())
sys.meta_path.insert(0, Reader())
