import json
import math
from pathlib import Path

import pytest

from dape.cli import main
from dape.cli.train import combinations, ending, parsed
from dape.errors import UserError
from dape.runs import RunFolder

RECIPES = Path(__file__).parents[2] / "recipes"


def fails(capsys, *argv):
    """Return the one line that a command prints before it ends with status 2."""
    assert main(["train", *map(str, argv)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_options_are_put_over_the_recipe():
    recipe = str(RECIPES / "350m.yaml")
    options = ["--model.scheme", "alibi", "--seed", "3", "--training.batch-size", "512"]
    arguments = parsed([recipe, *options, "--optimizer.clip-norm", "None", "--dry-run"])
    found = arguments.recipe
    assert (found.model.scheme, found.seed, found.training.batch_size) == ("alibi", 3, 512)
    assert found.optimizer.clip_norm is None and found.optimizer.learning_rate == 3e-4
    assert found.model.hidden_size == 1024 and found.folder == Path("runs/350m-alibi")
    assert arguments.dry_run and not parsed([recipe]).dry_run


def test_scheme_options_are_yaml():
    options = ["--model.scheme-options", "{adapter: {hidden: 8, inputs: sum}}"]
    recipe = parsed([str(RECIPES / "125m.yaml"), *options]).recipe
    assert recipe.model.scheme_options == {"adapter": {"hidden": 8, "inputs": "sum"}}
    with pytest.raises(UserError, match=r"'hidden=8' is not a YAML mapping such as"):
        parsed([str(RECIPES / "125m.yaml"), "--model.scheme-options", "hidden=8"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.btach-size", "3"], "did you mean '--training.batch-size'?"),
        (["--training.steps", "many"], "--training.steps: invalid literal for int()"),
        (["--training.precision", "fp16"], "invalid choice 'fp16'"),
        (["--hardware.micro-batch-size", "3"], "training.batch_size=256 is not a multiple"),
        (["--model.scheme", "dape-kerpel"], "did you mean 'dape-kerple'?"),
        (["--model.backend", "trition"], "unknown backend 'trition'"),
        (["--model.scheme-options", "{adapter: {hiden: 3}}"], "'hiden'; did you mean 'hidden'?"),
        (["--data", "nowhere"], "no finished corpus in nowhere"),
        (["--tracking.service", "wandb"], "pip install wandb"),
    ],
)
def test_a_mistake_is_one_line(capsys, options, message):
    assert message in fails(capsys, RECIPES / "125m.yaml", "--hardware.device", "cpu", *options)


def test_a_sweep_is_a_run_for_each_scheme(capsys):
    recipe = RECIPES / "125m.yaml"
    options = ["--hardware.device", "cpu", "--dry-run", "--model.scheme"]
    assert main(["train", str(recipe), *options, "kerple,dape-kerple"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    folders = [words[1] for words in printed if words[0] == "run"]
    assert folders == ["runs/125m-kerple", "runs/125m-dape-kerple"]
    assert "did you mean 'alibi'" in fails(capsys, recipe, *options, "kerple,alib")
    assert "share a folder" in fails(capsys, recipe, *options, "kerple,alibi", "--out", "runs/x")
    assert "share a folder" in fails(capsys, recipe, *options, "kerple,kerple")


def test_any_setting_can_be_swept(capsys):
    words = [
        *("--model.scheme", "kerple,alibi", "--seed=0,1", "--optimizer.betas", "0.9", "0.95"),
        *("--model.scheme-options", "{adapter: {hidden: 8, inputs: sum}}"),
    ]
    kept = [*words[3:6], *words[6:]]
    assert list(combinations(["r,s.yaml", *words])) == [
        ["r,s.yaml", "--model.scheme", scheme, f"--seed={seed}", *kept]
        for scheme in ("kerple", "alibi")
        for seed in (0, 1)
    ]
    options = ["--hardware.device", "cpu", "--dry-run", "--model.scheme-options"]
    hidden = "{adapter: {hidden: 4}},{adapter: {hidden: 8}}"
    assert "share a folder" in fails(capsys, RECIPES / "125m.yaml", *options, hidden)
    named = ["--name", "hidden-{model.scheme_options.adapter.hidden}"]
    assert main(["train", str(RECIPES / "125m.yaml"), *options, hidden, *named]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    folders = [words[1] for words in printed if words[0] == "run"]
    assert folders == ["runs/hidden-4", "runs/hidden-8"]


def test_a_recipe_is_named_first(capsys):
    for argv in ([], ["--seed", "3"]):
        assert "name a recipe first: `dape train RECIPE.yaml" in fails(capsys, *argv)


def test_ranks_that_cannot_share_the_batch(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = fails(capsys, RECIPES / "125m.yaml", "--hardware.device", "cpu")
    assert "hardware.micro_batch_size=32 x 3 devices" in line
    line = fails(capsys, RECIPES / "125m.yaml", "--model.scheme", "kerple,alibi")
    assert "model.scheme=kerple,alibi on 3 devices" in line
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(RECIPES / "125m.yaml"), "--hardware.device", "cpu"]) == 2
    assert capsys.readouterr().err == "", "the first rank speaks for all"


def test_the_first_rank_prints_the_cost(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["train", str(RECIPES / "125m.yaml"), "--model.vocab-size", "300", "--dry-run"]
    words += ["--hardware.device", "cpu"]
    for rank, lines in ("0", 6), ("1", 0):
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_the_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert "--optimizer.warmup FLOAT" in page and "fraction of the steps" in page
    assert "the same command again resumes" in page


def test_a_dry_run_tells_what_the_paper_trained(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(RECIPES / "125m.yaml"), "--dry-run", "--hardware.device", "cpu"]) == 0
    printed = capsys.readouterr().out
    blocks = 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert f"parameters  {blocks + 2 * 50304 * 768 + 14_352 + 288:,}" in printed
    assert "14,640 parameters for positions" in printed
    assert f"{256 * 512:,} tokens: 1 device x 8 micro-batches x 32 sequences x 512" in printed
    products = 12 * 12 * 768**2 + 50304 * 768
    pairs = 12 * (4 * 768 + 2 * (24 * 32 + 32 * 12))  # scores, weighted sum, and the adapter
    flops = (6 * products + 3 * 512 * pairs) * 256 * 512
    assert f" x 512, {flops:.2e} FLOP" in printed
    assert f"50,000 steps, {50_000 * 256 * 512:,} tokens, {50_000 * flops:.2e} FLOP" in printed
    assert "weights, gradients, moments 2.42" in printed
    assert not any(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(RECIPES / "125m.yaml"), "--dry-run", "--hardware.device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"{256 * 512:,} tokens: 2 devices x 4 micro-batches x 32 sequences x 512" in printed
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = ["--dry-run", "--hardware.device", "cpu", "--hardware.compile", "none"]
    shared += ["--hardware.context-parallel", "2"]
    assert main(["train", str(RECIPES / "125m.yaml"), *shared]) == 0
    step = f"{256 * 512:,} tokens: 2 groups of 2 devices x 4 micro-batches x 32 sequences x 512"
    assert step in capsys.readouterr().out


def test_a_dry_run_without_data_needs_the_vocabulary(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no finished corpus in data/python-stdlib" in fails(
        capsys, RECIPES / "demo.yaml", "--dry-run", "--hardware.device", "cpu"
    )


def test_the_end_of_a_run_is_a_line_and_so_is_a_record_without_it(tmp_path):
    run = RunFolder(tmp_path)
    run.update_record({"step": 6, "tokens": 1024, "validation_loss": 2.5, "ended": "then"})
    assert ending(run).startswith(f"{run} is finished: 6 steps, 1,024 tokens, validation loss 2.50")
    run.update_record({"validation_loss": math.nan})
    assert "validation loss nan" in ending(run)
    content = json.loads(run.record.read_text())
    del content["validation_loss"]
    run.record.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        ending(run)
