"""Which packages are installed."""

import sys

import pytest

from dape.data import corpora
from dape.errors import UserError
from dape.packages import has_package
from dape.train import track
from dape.train.recipe import Recipe
from dape.train.sections import Tracking


def test_a_package_is_installed_or_not():
    assert has_package("torch") and has_package("yaml")
    assert not has_package("no_such_package")


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path, monkeypatch):
    """As wandb leaves one where `python -m dape` starts."""
    for name in ("wandb", "datasets"):
        (tmp_path / name / "run-1").mkdir(parents=True)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(UserError, match="run `pip install wandb`"):
        track.check(Recipe(tracking=Tracking(service="wandb")))
    with pytest.raises(UserError, match=r"pip install '\.\[datasets\]'"):
        corpora.resolve("owner/dataset")
