"""The Auto classes of transformers know the models, in this process and in any other."""

import filecmp
import json
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


LOAD = """
import sys, pathlib, torch
from transformers import AutoModelForCausalLM
folder = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code={trust})
ids, logits = torch.load(folder.parent / "expected.pt")
assert torch.equal(model(ids).logits, logits)
assert type(model).__module__ == "dape.model.modeling"
"""
BEFORE = [
    "import dape",
    "from transformers import AutoModelForCausalLM; import dape",
    # The page of a model imports the Auto classes midway through what ours needs.
    "import dape; from transformers import LlamaForCausalLM",
]
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name == "dape":
            raise ModuleNotFoundError("No module named 'dape'", name=name)
sys.meta_path.insert(0, Absent())
"""
PROGRAMS = {before: before + LOAD.format(trust=False) for before in BEFORE} | {
    "with trust": LOAD.format(trust=True) + 'model.save_pretrained(folder.parent / "again")',
    "absent": ABSENT + LOAD.format(trust=True),
}
# Each program is a process that has imported PyTorch, and neither transformers nor dape.
FORKS = """
import json, os, sys, traceback
import accelerate, huggingface_hub, safetensors.torch, tokenizers
import torch, torch._dynamo, torch.distributed.tensor
assert not {"dape", "transformers"} & sys.modules.keys()
codes = {}
for number, (name, program) in enumerate(json.loads(sys.argv[2]).items()):
    if not os.fork():
        code = 1
        try:
            os.environ["HF_MODULES_CACHE"] = f"{sys.argv[1]}-modules-{number}"
            sys.stderr = open(f"{sys.argv[1]}-{number}.txt", "w")
            exec(program, {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    codes[name] = code, open(f"{sys.argv[1]}-{number}.txt").read()
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, with ids and the logits it gives them beside it."""
    folder = tmp_path_factory.mktemp("auto")
    model, ids = fresh(scheme="dape-kerple"), tokens(2, 9)
    model.save_pretrained(folder / "model")
    torch.save((ids, model(ids).logits), folder / "expected.pt")
    return folder / "model"


@pytest.fixture(scope="module")
def ended(folder):
    """Return the exit code and the errors of each program."""
    run = subprocess.run(
        [sys.executable, "-c", FORKS, folder, json.dumps(PROGRAMS)],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


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


@pytest.mark.parametrize("before", BEFORE)
def test_importing_dape_is_enough_in_any_order(before, ended):
    code, errors = ended[before]
    assert code == 0, errors


def test_a_process_that_never_imported_dape_loads_with_trust(ended, folder):
    code, errors = ended["with trust"]
    assert code == 0, errors
    names = sorted(file.name for file in folder.iterdir())
    assert names == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_dape.py"
    ]  # fmt: skip
    assert names == sorted(file.name for file in (folder.parent / "again").iterdir())
    assert filecmp.cmpfiles(folder, folder.parent / "again", names, shallow=False)[0] == names


def test_without_the_package_one_line_says_what_to_install(ended):
    code, errors = ended["absent"]
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith("ImportError: ") and last.endswith("Run `pip install dape`")


def test_the_announcement_answers_for_one_module_as_python_itself_does():
    finder = Announcement()
    assert finder.find_spec("json", None) is None
    path = sys.modules["transformers.models.auto"].__path__
    assert finder.find_spec(AUTO_CONFIG, path).origin == find_spec(AUTO_CONFIG).origin
