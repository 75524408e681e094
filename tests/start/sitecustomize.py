"""What every process of the tests does first: Python reads this file as it starts."""

import gc
import importlib.metadata
import json
import os
import sys

# Imports make many objects and no garbage, and a fifth of their time went into looking for some.
gc.set_threshold(100_000)
# lm-eval installs scikit-learn. Where it is, transformers imports it, which takes a second or two.
sys.modules["sklearn"] = None
# transformers asks for the packages of all distributions, which the first process has read.
if "TEST_PACKAGES" in os.environ:
    importlib.metadata.packages_distributions = lambda: json.loads(os.environ["TEST_PACKAGES"])
else:
    os.environ["TEST_PACKAGES"] = json.dumps(importlib.metadata.packages_distributions())
