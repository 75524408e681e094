"""The code and commands of docs/longer-contexts.md, in their order, with a small Llama."""

import json
import math
import re
import shlex
from dataclasses import asdict

import pytest
import torch
import yaml
from pages import ROOT, execute, small_recipe, text
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dape import DapeConfig, DapeForCausalLM
from dape.cli import retrofit
from dape.data.tokenizer import byte
from dape.model.retrofit.choice import PARTS

PAGE = "docs/longer-contexts.md"
OPTIONS = re.findall(r"^\| `(--[^`]+)` \|", text(PAGE), flags=re.MULTILINE)
LENGTHS = [512, 1024, 2048, 4096, 8192]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return the folder in which the page was followed."""
    folder = tmp_path_factory.mktemp("longer")
    for split, size in {"train": 12_000, "validation": 4_000, "test": 8_300}.items():
        (folder / "books" / split).mkdir(parents=True)
        words = " ".join(str(number) for number in range(size))
        (folder / "books" / split / "book.txt").write_text(words[:size])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    byte().save_pretrained(folder / "my-model")
    small_recipe("retrofit.yaml", folder, model={"options": {"adapter": {"hidden": 2}}})
    return folder


@pytest.fixture(scope="module")
def names(desk):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        return execute(PAGE)


def test_lora_and_adapters_train_beside_each_other(names, desk):
    from safetensors.torch import load_file

    adapters = load_file(desk / "adapters-beside-lora" / "adapters.safetensors")
    saved = load_file(desk / "my-lora" / "adapter_model.safetensors")
    assert len([name for name in saved if ".lora_" in name]) == 2 * 2
    assert len([name for name in saved if ".lora_" not in name]) == len(adapters)
    held = {id(parameter) for parameter in names["mounted"].adapters.parameters()}
    reached = [p for p in names["mounted"].model.parameters() if p.grad is not None]
    assert {id(p) for p in reached} > held


def test_mounting_changes_nothing_and_unmounting_leaves_nothing(names):
    torch.testing.assert_close(names["unchanged"], names["before"], rtol=0, atol=1e-5)
    assert torch.equal(names["after"], names["before"])


def test_training_changes_the_adapters_and_saving_keeps_them(names):
    assert (names["trained"] - names["before"]).abs().max() > 1e-3
    assert torch.equal(names["loaded"], names["trained"])


def test_generation_goes_on_from_what_the_trained_model_says(names):
    text = names["text"]["input_ids"]
    assert names["generated"].shape[1] == text.shape[1] + 8
    assert names["generated"][0, text.shape[1]] == names["trained"][0, -1].argmax()


def test_the_base_is_as_it_was_and_measured_beside_its_adapters(desk, names):
    run = desk / "runs" / "retrofit" / "dape-kerple-0"
    assert (run / "adapters" / "adapters.safetensors").is_file()
    assert not (run / "model").exists()
    for folder in (desk / "my-model", run):
        content = json.loads((folder / "evaluation" / "last.json").read_text())
        assert [each["length"] for each in content["measurements"]] == LENGTHS
        assert all(math.isfinite(each["loss"]) for each in content["measurements"])
        retrieved = json.loads((folder / "retrieval" / "passkey.json").read_text())
        assert len(retrieved["cells"]) == 3 * 3
    for figure in ("passkey.png", "before-and-after.png"):
        assert (desk / figure).read_bytes().startswith(b"\x89PNG")


def test_the_names_on_the_page_are_those_of_retrofit():
    assert {"dape", "dape3", "talking-heads"} <= PARTS["adapter"].keys()
    assert "kerple" in PARTS["bias"]


def test_a_rope_model_is_loaded_as_yarn(tmp_path):
    """The last line of the page: YaRN's angles and temperature, on RoPE's weights."""
    assert 'from_pretrained(DIR, scheme="yarn")' in text(PAGE)
    sizes = {"vocab_size": 11, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = DapeForCausalLM(DapeConfig(scheme="rope", **sizes))
    rope.save_pretrained(tmp_path / "rope")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "rope", scheme="yarn")
    yarn = DapeForCausalLM(DapeConfig(scheme="yarn", **sizes))
    yarn.load_state_dict(rope.state_dict())
    tokens = torch.randint(11, (1, 600))
    with torch.no_grad():
        found, expected, plain = (each.eval()(tokens).logits for each in (loaded, yarn, rope))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_options_on_the_page_are_taken(options):
    words = shlex.split(options)
    recipe = str(ROOT / "recipes" / "retrofit.yaml")
    found = asdict(retrofit.read(["my-model", "--recipe", recipe, *words]).recipe)
    for name, value in zip(words[::2], words[1::2], strict=True):
        section, key = name.removeprefix("--").split(".")
        assert str(found[section][key]) == str(yaml.safe_load(value))
