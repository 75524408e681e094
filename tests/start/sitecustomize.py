"""What no process of the tests imports: Python reads this file as it starts."""

import sys

# lm-eval installs scikit-learn. Where it is, transformers imports it, which takes a second or two.
sys.modules["sklearn"] = None
