"""The commands of docs/chomsky.md run as they stand, on a small benchmark."""

import pytest
import yaml
from pages import execute, text

from dape.chomsky import benchmark as benchmarks
from dape.chomsky.benchmark import Benchmark

PAGE, RECIPE = "docs/chomsky.md", "recipes/chomsky.yaml"
SMALL = {
    "tasks": ["even-pairs"],
    "schemes": ["kerple", "dape-kerple"],
    "seeds": [0, 1],
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "training": {"steps": 2, "batch_size": 4, "length": 4},
    "evaluation": {"longest": 8, "samples": 4},
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return the folder in which the commands of the page were given."""
    folder = tmp_path_factory.mktemp("chomsky")
    recipe = yaml.safe_load(text(RECIPE))
    for section, values in SMALL.items():
        recipe[section] = (
            {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
        )
    (folder / "recipes").mkdir()
    (folder / RECIPE).write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        execute(PAGE)
    return folder


def test_every_file_of_the_page_is_there(desk):
    out = desk / "runs" / "chomsky"
    files = ("table.md", "scores.svg", "lengths.svg", "training.svg")
    cells = ("cells/even-pairs/kerple-1.json", "models/even-pairs/dape-kerple-0.safetensors")
    assert all((out / name).exists() for name in (*files, *cells))
    assert (desk / "map.svg").exists() and "corr(f, A)" in (desk / "map.md").read_text()


def test_the_recipe_says_the_defaults(tmp_path):
    (tmp_path / "recipe.yaml").write_text(text(RECIPE))
    assert benchmarks.read(tmp_path / "recipe.yaml") == Benchmark()
