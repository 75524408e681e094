"""`dape retrofit` on tiny models, against losses that the models themselves report."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dape
from dape import cli
from dape.cli.retrofit import read
from dape.data.prepare import Options, Preparation
from dape.data.shards import Corpus, Windows
from dape.evaluate.opening import open_model
from dape.train.recipe import Recipe, write
from dape.train.sections import Model, Training

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {
    "vocab_size": 257, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 48, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=20, num_key_value_heads=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES)),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=257, hidden_size=24, n_layer=2, n_head=6)
    ),
}
QUICK = [
    *("--training.length", 24, "--training.steps", 4, "--training.batch-size", 4),
    *("--training.precision", "fp32", "--hardware.device", "cpu", "--optimizer.learning-rate", 0.1),
    *("--tracking.validation-batches", 1, "--lengths", "16,32", "--documents", 2),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, chosen = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for split, sizes in {"train": [900], "validation": [300], "test": [200, 20, 300]}.items():
        (folder / "text" / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            text = "".join(chosen.choice("abcd é") for _ in range(size))
            (folder / "text" / split / f"{number}.txt").write_text(text)
    options = Options(sources=(str(folder / "text"),), out=folder / "data", workers=1)
    for _ in Preparation(options).run():
        pass
    return folder / "data"


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("models")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        Corpus(corpus).tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def command(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda model, *words: cli.main(
        [str(word) for word in ("retrofit", model, "--data", corpus, *QUICK, *words)]
    )


def refused(capsys, command, *words):
    assert command(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def evaluation(folder):
    return json.loads((folder / "evaluation" / "last.json").read_text())


def expected_losses(model, corpus, content):
    """Return what the model itself says of the loss of each document."""
    part, found = Corpus(corpus).split("test"), []
    for number in content["targets"]["documents"]:
        text = torch.from_numpy(part.document(number))
        last = (part.document_lengths[number] - 1 - 33) // 32
        blocks = np.linspace(0, last, min(4, last + 1)).round().astype(int)
        losses = []
        for block in blocks:
            tokens = text[None, 33 + 32 * block - 33 : 33 + 32 * block].long()
            labels = tokens.clone()
            labels[:, :-16] = -100
            with torch.no_grad():
                losses.append(model(input_ids=tokens[:, :], labels=labels).loss.item())
        found.append(np.mean(losses))
    return found


def test_adapters_are_trained_saved_and_measured_before_and_after(models, corpus, command, capsys):
    assert not command(models / "llama")
    run = Path("runs/retrofit-dape-kerple")
    shown = capsys.readouterr()
    assert "llama + dape-kerple against llama" in shown.out
    before, after = evaluation(models / "llama"), evaluation(run)
    assert before["targets"] == after["targets"] and len(after["targets"]["documents"]) == 2
    assert (before["scheme"], after["scheme"]) == ("llama", "llama + dape-kerple")
    assert (before["train_length"], after["train_length"]) == (48, 24)
    model = AutoModelForCausalLM.from_pretrained(models / "llama").eval()
    for content in (before, after):
        measured = content["measurements"][1]
        assert measured["length"] == 32
        losses = expected_losses(model, corpus, content)
        assert measured["document_losses"] == pytest.approx(losses, rel=1e-5)
        if content is before:
            dape.load_adapters(model, run / "adapters")
    first, second = (content["measurements"][1]["loss"] for content in (before, after))
    assert abs(first - second) > 1e-5, "or the adapters were not there"


def test_the_same_command_trains_no_more_and_measures_again(models, command, capsys):
    assert not command(models / "llama")
    metrics = Path("runs/retrofit-dape-kerple/metrics.jsonl").read_text()
    first = evaluation(Path("runs/retrofit-dape-kerple"))["measurements"]
    capsys.readouterr()
    assert not command(models / "llama", "--lengths", "16,32")
    assert "parameters train" not in capsys.readouterr().out
    assert Path("runs/retrofit-dape-kerple/metrics.jsonl").read_text() == metrics
    assert evaluation(Path("runs/retrofit-dape-kerple"))["measurements"] == first


def test_a_change_of_the_configuration_is_measured_without_training(
    tmp_path, corpus, command, capsys
):
    sizes = {**SIZES, "intermediate_size": 20, "initializer_range": 0.5}  # positions tell
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    Corpus(corpus).tokenizer().save_pretrained(tmp_path / "llama")
    rotation = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    untrained = ("--model.adapter", "None", "--model.train", "all", "--training.steps", 0)
    changed = ("--model.config", json.dumps({"rope_parameters": rotation}), "--name", "pi")
    assert not command(tmp_path / "llama", *untrained, *changed, "--measure", "run")
    assert "step 0/0  validation" in capsys.readouterr().out
    content = evaluation(Path("runs/pi"))
    assert (content["scheme"], content["train_length"]) == ("llama", 48)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama", rope_parameters=rotation
    ).eval()
    measured = content["measurements"][1]["document_losses"]
    assert measured == pytest.approx(expected_losses(model, corpus, content), rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert measured != pytest.approx(expected_losses(plain, corpus, content), rel=1e-2)
    (metrics,) = map(json.loads, Path("runs/pi/metrics.jsonl").read_text().splitlines())
    assert metrics["step"] == 0
    tokens = np.stack([Windows(Corpus(corpus).split("validation"), 24, 0)[n] for n in range(4)])
    tokens = torch.from_numpy(tokens)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert metrics["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_adapters_on_a_changed_configuration_are_measured_with_the_change(
    tmp_path, corpus, command
):
    sizes = {**SIZES, "intermediate_size": 20, "initializer_range": 0.5}  # positions tell
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    Corpus(corpus).tokenizer().save_pretrained(tmp_path / "llama")
    rotation = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    changed = ("--model.config", json.dumps({"rope_parameters": rotation}), "--name", "both")
    assert not command(tmp_path / "llama", *changed, "--measure", "run")
    content = evaluation(Path("runs/both"))
    measured = content["measurements"][1]["document_losses"]
    for options, same in (({"rope_parameters": rotation}, True), ({}, False)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", **options).eval()
        dape.load_adapters(model, "runs/both/adapters")
        expected = pytest.approx(expected_losses(model, corpus, content), rel=1e-5)
        assert (measured == expected) == same


def test_the_base_is_measured_or_left_alone(models, command, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(models / "llama", model, ignore=shutil.ignore_patterns("evaluation"))
    run = Path("runs/retrofit-dape-kerple")
    assert not command(model, "--measure", "none")
    assert (run / "adapters").exists() and not (run / "evaluation").exists()
    assert not command(model, "--measure", "run")
    assert evaluation(run)["measurements"] and not (model / "evaluation").exists()
    assert not command(model)
    assert evaluation(model)["provenance"]["precision"] == "fp32"


def test_learned_positions_end_where_they_end_with_adapters_too(models, command, capsys):
    assert not command(models / "gpt2", "--lengths", "16,64", "--name", "g")
    content = evaluation(Path("runs/g"))
    assert [each["length"] for each in content["measurements"]] == [16]
    assert "no learned position for row" in content["refused"]["64"]


@pytest.mark.parametrize("length", [16, 24])
def test_a_stored_table_of_positions_reaches_as_far_with_adapters(
    tmp_path, corpus, command, length
):
    """Beyond `n_positions`, in training and in windows, as the formula of the table goes on."""
    sizes = {"vocab_size": 257, "n_embd": 24, "n_layer": 2, "n_head": 4, "dff": 20}
    ends = {"n_positions": 20, "bos_token_id": None, "eos_token_id": None}
    CTRLLMHeadModel(CTRLConfig(**sizes, **ends)).save_pretrained(tmp_path / "ctrl")
    Corpus(corpus).tokenizer().save_pretrained(tmp_path / "ctrl")
    assert not command(tmp_path / "ctrl", "--training.length", length, "--name", "c")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ctrl", n_positions=33).eval()
    dape.load_adapters(model, "runs/c/adapters")
    content = evaluation(Path("runs/c"))
    measured = content["measurements"][1]["document_losses"]
    assert measured == pytest.approx(expected_losses(model, corpus, content), rel=1e-5)


def test_training_beyond_learned_positions_is_one_line(models, command, capsys):
    line = refused(capsys, command, models / "gpt2", "--training.length", 49, "--name", "far")
    assert "training.length=49: no learned position for row 48: the table has 48 rows" in line
    assert not Path("runs/far").exists()


def test_what_it_saved_is_shared_as_it_is(models, command, capsys):
    assert not command(models / "llama", "--name", "a")
    assert cli.main(["export", "runs/a", "--out", "shared"]) == 2
    line = "dape: error: runs/a is a run of `dape retrofit`; share the saved adapters or model\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_model_with_alibi_takes_no_other_bias(models, command, capsys):
    line = refused(capsys, command, models / "bloom", "--name", "b")
    assert "bias='kerple': the model has ALiBi already" in line
    assert not Path("runs/b").exists()
    assert not command(models / "bloom", "--name", "b", "--model.bias", "None")
    assert evaluation(Path("runs/b"))["scheme"] == "bloom + dape"


def test_seeds_of_a_trained_run_and_of_its_fine_tuning_are_one_group(corpus, command, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = dape.DapeConfig(scheme="rope", vocab_size=257, train_length=16, **sizes)
        folder = tmp_path / f"rope-{seed}"
        dape.DapeForCausalLM(config).save_pretrained(folder / "model")
        Corpus(corpus).tokenizer().save_pretrained(folder / "model")
        recipe = Recipe(
            data=str(corpus), seed=seed, model=Model("rope", **sizes), training=Training(length=16)
        )
        (folder / "config.yaml").write_text(write(recipe))
        assert not command(folder, "--seed", seed, "--name", f"tuned-{seed}")
        options = ("--model.adapter", "None", "--model.train", "all", "--name", f"plain-{seed}")
        assert not command(folder, "--seed", seed, *options)
    for name, scheme in (("tuned", "rope + dape-kerple"), ("plain", "rope fine-tuned")):
        first, second = (open_model(Path(f"runs/{name}-{seed}")) for seed in (0, 1))
        assert first.settings == second.settings and first.scheme == scheme
        assert [evaluation(each.folder.path)["seed"] for each in (first, second)] == [0, 1]
    assert open_model(Path("runs/tuned-0")).settings != open_model(Path("runs/plain-0")).settings
    first, second = (open_model(Path(f"runs/tuned-{seed}")) for seed in (0, 1))
    assert first.trained_on == second.trained_on
    for trained in (second.folder, second.base.folder):
        record = trained.read_record()
        trained.update_record({"data": {"path": str(corpus), "checksum": "of other texts"}})
        assert first.trained_on != second.trained_on
        trained.record.write_text(json.dumps(record))


def test_seeds_of_a_retrofit_have_the_weights_of_the_model_of_others_in_common(models, command):
    assert not command(models / "llama", "--name", "tuned", "--measure", "none")
    found = open_model(Path("runs/tuned"))
    before = found.trained_on
    assert before
    found.folder.update_record({"base_weights": "of another model"})
    assert found.trained_on != before


def test_an_unfinished_run_is_not_measured(models, command, capsys):
    assert not command(models / "llama", "--name", "part")
    for file in Path("runs/part/adapters").iterdir():
        file.unlink()
    Path("runs/part/adapters").rmdir()
    capsys.readouterr()
    assert cli.main(["eval", "runs/part", "--lengths", "16"]) == 2
    assert "runs/part is not finished; run the same `dape retrofit` again" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe"], "--recipe needs a file"),
        (["--recipe", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--recipe", RECIPES / "demo.yaml"], "demo.yaml: unknown key 'model.scheme'"),
        (["--training.lenght", "3"], "did you mean '--training.length'"),
        (["--model.adapter", "dpae", "--lengths", "4096"], "did you mean 'dape'"),
        (["--model.options", "{bias: {a: 1}}", "--lengths", "4096"], "unknown option"),
        (["--model.backend", "trition"], "unknown backend 'trition'"),
        (["--lengths", "4096"], "no document has the required 4097 tokens"),
        (["--protocol", "sliding"], "--protocol"),
        (["--hardware.compile", "blocks"], "hardware.compile='blocks'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(models, command, capsys, words, message):
    assert message in refused(capsys, command, models / "llama", *words)
    assert not Path("runs").exists()


def test_a_model_is_named_first_and_there(command, capsys, tmp_path):
    assert cli.main(["retrofit"]) == 2
    assert "name a model first: `dape retrofit MODEL" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert "no model in empty" in refused(capsys, command, "empty")


def test_the_recipe_is_put_under_the_options():
    recipe = read(["some/model", "--recipe", str(RECIPES / "retrofit.yaml"), "--seed", "3"]).recipe
    assert recipe.model.base == "some/model" and recipe.folder == Path(
        "runs/retrofit/dape-kerple-3"
    )
    assert recipe.training == Training(length=2048, batch_size=32, steps=1000)
    assert (recipe.optimizer.learning_rate, recipe.hardware.micro_batch_size) == (1e-2, 4)
    assert recipe.micro_batches(groups=8) == 1
    assert read(["m"]).recipe.folder == Path("runs/retrofit-dape-kerple")


def test_the_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["retrofit", "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert "--model.adapter" in page and "--recipe FILE.yaml" in page and "model.base" not in page
