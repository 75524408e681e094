"""From the folder of a run to the model in the folder."""

import json

import pytest
import yaml

from dape.errors import UserError
from dape.evaluate.opening import open_model
from folders import make_run, prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path, corpus):
    return make_run(tmp_path / "run", corpus, "dape-kerple")


def changed(file, section, **values):
    read, write = (
        (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.dump)
    )
    content = read(file.read_text())
    (content[section] if section else content).update(values)
    file.write_text(write(content))


@pytest.mark.parametrize(
    ("name", "value", "recipe"),
    [("train_length", 32, 16), ("scheme", "kerple", "dape-kerple"), ("num_hidden_layers", 2, 1)],
)
def test_a_model_unlike_its_recipe_is_refused(run, name, value, recipe):
    changed(run / "model/config.json", None, **{name: value})
    with pytest.raises(UserError) as refused:
        open_model(run)
    assert str(refused.value).startswith(
        f"{run}/model/config.json has {name}={value!r}, the recipe of the run {recipe!r}; one of"
    )


def test_a_recipe_unlike_its_model_is_refused(run):
    changed(run / "config.yaml", "training", length=24)
    with pytest.raises(UserError, match=r"has train_length=16, the recipe of the run 24; one of"):
        open_model(run)


def test_what_the_weights_do_not_hold_may_differ(run):
    changed(run / "config.yaml", "model", backend="reference", vocab_size=None)
    assert open_model(run).train_length == 16
    changed(run / "config.yaml", "model", vocab_size=300)
    with pytest.raises(UserError, match=r"has vocab_size=257, the recipe of the run 300"):
        open_model(run)


def test_a_run_that_lost_its_recipe_is_no_model_of_others(run):
    (run / "run.json").write_text("{}")
    assert open_model(run).recipe
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
        open_model(run)
    (run / "run.json").unlink()
    assert open_model(run).recipe is None
