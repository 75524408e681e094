"""The Auto classes of transformers know the models, in this process and in any other."""

import filecmp
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from models import SIZES, fresh, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import dape
from dape.model.announce import AUTO_CONFIG, Announcement

CLASSES = {
    AutoModel: dape.DapeModel,
    AutoModelForCausalLM: dape.DapeForCausalLM,
    AutoModelForSequenceClassification: dape.DapeForSequenceClassification,
}
every_auto_class = pytest.mark.parametrize("auto", CLASSES, ids=lambda auto: auto.__name__)


@pytest.fixture
def folder(tmp_path):
    """A saved model, with ids and the logits it gives them beside it."""
    model, ids = fresh(scheme="dape-kerple"), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    return tmp_path / "model"


def python(statements, folder):
    """Run statements in a fresh process with its own cache of remote code."""
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", statements, folder], env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


LOAD = """
import sys, pathlib, torch
from transformers import AutoModelForCausalLM
folder = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code={trust})
ids, logits = torch.load(folder.parent / "expected.pt")
assert torch.equal(model(ids).logits, logits)
assert type(model).__module__ == "dape.model.modeling"
"""


@every_auto_class
def test_every_auto_class_loads_what_the_class_itself_does(auto, tmp_path):
    torch.manual_seed(0)
    model, ids = CLASSES[auto](fresh(pad_token_id=0).config).eval(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is CLASSES[auto]
    assert torch.equal(loaded(ids)[0], model(ids)[0])


@every_auto_class
def test_every_auto_class_builds_from_a_configuration(auto):
    config = AutoConfig.for_model("dape", **SIZES)
    torch.manual_seed(0)
    built = auto.from_config(config)
    torch.manual_seed(0)
    expected = CLASSES[auto](config)
    for ours, theirs in zip(built.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "before",
    [
        "import dape",
        "from transformers import AutoModelForCausalLM; import dape",
        # The page of a model imports the Auto classes midway through what ours needs.
        "import dape; from transformers import LlamaForCausalLM",
    ],
)
def test_importing_dape_is_enough_in_any_order(before, folder):
    run = python(before + LOAD.format(trust=False), folder)
    assert run.returncode == 0, run.stderr


def test_a_process_that_never_imported_dape_loads_with_trust(folder):
    again = 'model.save_pretrained(folder.parent / "again")'
    run = python(LOAD.format(trust=True) + again, folder)
    assert run.returncode == 0, run.stderr
    names = sorted(file.name for file in folder.iterdir())
    assert names == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_dape.py"
    ]  # fmt: skip
    assert names == sorted(file.name for file in (folder.parent / "again").iterdir())
    assert filecmp.cmpfiles(folder, folder.parent / "again", names, shallow=False)[0] == names


def test_without_the_package_one_line_says_what_to_install(folder):
    absent = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name == "dape":
            raise ModuleNotFoundError("No module named 'dape'", name=name)
sys.meta_path.insert(0, Absent())
"""
    run = python(absent + LOAD.format(trust=True), folder)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and last.endswith("Run `pip install dape`")


def test_the_announcement_answers_for_one_module_as_python_itself_does():
    finder = Announcement()
    assert finder.find_spec("json", None) is None
    path = sys.modules["transformers.models.auto"].__path__
    assert finder.find_spec(AUTO_CONFIG, path).origin == find_spec(AUTO_CONFIG).origin
