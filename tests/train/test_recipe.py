import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from dape.errors import UserError
from dape.train import recipe as recipes
from dape.train.recipe import Recipe
from dape.train.sections import Hardware, Training

RECIPES = Path(__file__).parents[2] / "recipes"


def read(tmp_path, text):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    return recipes.read(file, Recipe)


def test_values_of_the_file_replace_the_defaults(tmp_path):
    recipe = read(
        tmp_path,
        """
        seed: 7
        model: {scheme: alibi, scheme_options: {bias: {}}, num_key_value_heads: 3}
        optimizer: {learning_rate: 1, betas: [0, 0.99], clip_norm: null}
        """,
    )
    assert recipe.seed == 7 and recipe.model.scheme == "alibi"
    assert recipe.model.num_key_value_heads == 3 and recipe.model.scheme_options == {"bias": {}}
    assert recipe.optimizer.learning_rate == 1.0
    assert type(recipe.optimizer.learning_rate) is float
    assert recipe.optimizer.betas == (0.0, 0.99) and recipe.optimizer.clip_norm is None
    assert recipe.model.hidden_size == 768 and recipe.training == Training()


def test_a_written_recipe_is_read_as_the_same(tmp_path):
    recipe = read(tmp_path, "model: {scheme_options: {adapter: {hidden: 8}}}\nname: a-{seed}")
    assert read(tmp_path, recipes.write(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {btach_size: 3}", "'training.btach_size'; did you mean 'training.batch_size'?"),
        ("trainin: {}", "unknown key 'trainin'; did you mean 'training'?"),
        ("training: 3", "training=3 must be a section of keys"),
        ("training: {length: 3.5}", "training.length=3.5: expected a whole number"),
        ("training: {length: true}", "training.length=True: expected a whole number"),
        ("optimizer: {learning_rate: 6e-4}", "'6e-4': expected a number; .* write 6.0e-04"),
        ("optimizer: {clip_norm: big}", "clip_norm='big': expected a number or nothing"),
        ("optimizer: {betas: [0.9]}", r"betas=\[0.9\]: expected a list of 2 numbers"),
        ("optimizer: {betas: [0.9, x]}", "betas='x': expected a number"),
        ("training: {precision: fp16}", "'fp16': expected 'bf16-mixed' or 'fp32'"),
        ("model: {num_attention_heads: 5}", "hidden_size=768 is not a multiple of .*heads=5"),
        ("model: {num_key_value_heads: 5}", "heads=12 is not a multiple of .*_heads=5"),
        ("model: {hidden_size: 0}", "model.hidden_size=0 must be at least 1"),
        ("hardware: {micro_batch_size: 3}", "batch_size=256 is not a multiple of .*size=3"),
        ("model: {block: modren}", "model.block='modren': expected 'paper' or 'modern'"),
        ("optimizer: {warmup: 1.5}", "optimizer.warmup=1.5 is a fraction"),
        ("optimizer: {eps: .nan}", "optimizer.eps=nan must be greater than 0"),
        ("optimizer: {betas: [0.9, 1.0]}", r"optimizer.betas=\[0.9, 1.0\] must lie in"),
        ("tracking: {log_every: 0}", "tracking.log_every=0 must be at least 1"),
        ("seed: -1", "seed=-1 must be at least 0"),
        ("seed: 4294967299", "seed=4294967299 must be below 4,294,967,296; PyTorch takes the rem"),
        ("name: '{shceme}'", "may hold {scheme} and {seed} only"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("model: {scheme: [", "some.yaml:"),
        ("just words", "holds no `key: value` lines"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value) and "some.yaml" in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent.yaml: No such file"):
        recipes.read(tmp_path / "absent.yaml", Recipe)


def test_a_missing_recipe_is_named_with_those_at_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match=r"^cannot read mine.yaml: .*; .*recipes/mine\.yaml"):
        recipes.read("mine.yaml", Recipe)
    with pytest.raises(UserError, match=r"^cannot read train: "):  # no folder of the package
        recipes.read("train", Recipe)


def test_the_recipes_of_the_checkout_are_found_from_every_folder(tmp_path, monkeypatch):
    here = recipes.read("recipes/paper/small.yaml", Recipe)
    monkeypatch.chdir(tmp_path)
    assert recipes.read("recipes/paper/small.yaml", Recipe) == here
    with pytest.raises(UserError, match=r"^cannot read demo.yaml: .*; .*recipes/demo\.yaml"):
        recipes.read("demo.yaml", Recipe)


def test_a_mistake_is_found_before_torch_is_loaded(tmp_path):
    (tmp_path / "bad.yaml").write_text("training: {steps: many}")
    script = (
        "import sys; from dape.cli import main; status = main(['train', 'bad.yaml']);"
        "heavy = {'torch', 'lightning_fabric', 'transformers', 'numpy'} & set(sys.modules);"
        "sys.exit(f'{status} {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    errors = done.stderr.decode().splitlines()
    assert errors[0].startswith("dape: error: bad.yaml: training.steps='many'")
    assert errors[1:] == ["2 set()"]


def test_the_batch_must_be_made_of_micro_batches():
    recipe = Recipe(hardware=Hardware(micro_batch_size=32))
    assert [recipe.micro_batches(ranks) for ranks in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(UserError, match=r"not a multiple of .*micro_batch_size=32 x 16 devices"):
        recipe.micro_batches(16)
    with pytest.raises(UserError, match="cannot be shared evenly by 3 devices"):
        Recipe().micro_batches(3)


def test_the_folder_carries_scheme_and_seed(tmp_path):
    recipe = read(tmp_path, "name: 125m-{scheme}-{seed}\nmodel: {scheme: alibi}\nseed: 3")
    assert recipe.folder == Path("runs/125m-alibi-3")
    assert read(tmp_path, "out: elsewhere").folder == Path("elsewhere")
    assert read(tmp_path, "seed: 1").folder == Path("runs/some")


def test_only_what_is_learned_from_makes_a_difference(tmp_path):
    first = read(tmp_path, "seed: 1")
    other = read(tmp_path, "name: x\ndata: y\nhardware: {compile: true}\ntracking: {log_every: 3}")
    assert recipes.differences(first, other) == ["seed=0 (was 1)"]
    third = read(tmp_path, "seed: 1\nmodel: {scheme_options: {adapter: {hidden: 4}}}")
    assert recipes.differences(first, third) == [
        "model.scheme_options={'adapter': {'hidden': 4}} (was {})"
    ]


# Layers, width, heads, learning rate: the paper's configuration files and those of GPT-NeoX.
SIZES = {
    "125m": (12, 768, 12, 6e-4),
    "350m": (24, 1024, 16, 3e-4),
    "2.7b": (32, 2560, 32, 1.6e-4),
    "6.7b": (32, 4096, 32, 1.2e-4),
}


@pytest.mark.parametrize("name", SIZES)
def test_recipes_of_the_paper(name):
    recipe = recipes.read(RECIPES / f"{name}.yaml", Recipe)
    model, optimizer = recipe.model, recipe.optimizer
    sizes = (model.num_hidden_layers, model.hidden_size, model.num_attention_heads)
    assert (*sizes, optimizer.learning_rate) == SIZES[name]
    assert recipe.training == Training(512, 256, 50_000, "bf16-mixed")
    assert (optimizer.warmup, optimizer.final, optimizer.betas) == (0.01, 0.1, (0.9, 0.95))
    assert (optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) == (1e-8, 0.1, 1.0)
    assert recipe.folder == Path(f"runs/{name}-dape-kerple")
    assert recipe.micro_batches(groups=8) >= 1


def test_the_small_recipes_run_without_a_gpu():
    small = {"cpu", "demo"}
    for name in small:
        recipe = recipes.read(RECIPES / f"{name}.yaml", Recipe)
        assert recipe.training.precision == "fp32" and recipe.model.vocab_size is None
    others = {*SIZES, "retrofit", "retrofit-base", "chomsky"}
    assert {file.stem for file in RECIPES.glob("*.yaml")} == small | others


def test_the_knobs_stay_few():
    sections = [Recipe, *(field.type for field in fields(Recipe) if is_dataclass(field.type))]
    knobs = [field for section in sections for field in fields(section)]
    assert len(knobs) - (len(sections) - 1) <= 45
    assert all(len(fields(section)) <= 15 for section in sections)
    assert yaml.safe_load(recipes.write(Recipe())).keys() == {
        field.name for field in fields(Recipe)
    }
