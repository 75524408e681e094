"""What importing `dape` costs and needs, and that its names are what they say."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dape
from dape.cli import COMMANDS

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "torch._dynamo", "transformers", "lightning_fabric", "matplotlib", "datasets"),
    "tensorboard",
}


def imported(statements):
    """Return which of the heavy libraries a fresh Python has imported after some statements."""
    code = f"import sys; {statements}; print(*({HEAVY!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_dape_imports_no_library():
    assert imported("import dape") == set()


CALLS = "dape.attention(x, x, x), dape.attention(x, x, x, dape.Kerple(2), dape.DAPE(2))"
STATEMENTS = {
    "attention": f"import dape; x = torch.ones(1, 2, 3, 4); {CALLS}",
    "experiments": "from dape.paper import experiments, plan",
    "evaluate": "import dape; assert dape.evaluate.evaluate.__module__ in sys.modules",
}


@pytest.fixture(scope="module")
def beside_torch():
    """Return which heavy libraries a Python with PyTorch alone has after each of the statements."""
    code = f"""
import json, os, sys, torch
for name, statement in {STATEMENTS!r}.items():
    if not os.fork():
        exec(statement)
        os.write(1, f"{{json.dumps([name, [*({HEAVY!r} & sys.modules.keys())]])}}\\n".encode())
        os._exit(0)
    assert not os.wait()[1], name
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {name: {*found} for name, found in map(json.loads, run.stdout.splitlines())}


def test_attention_and_its_parts_import_torch_alone(beside_torch):
    """PyTorch's compiler, torch._dynamo, would double the time of the import."""
    assert beside_torch["attention"] == {"torch"}


def test_experiments_are_listed_and_planned_without_the_models(beside_torch):
    assert beside_torch["experiments"] == {"torch"}


def asked():
    """Return the distributions that an installation without extras brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, left = {"dape"}, project["dependencies"]
    while left:
        need = Requirement(left.pop())
        name = canonicalize_name(need.name)
        if name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
            found.add(name)
            left += requires(name) or ()
    return found


# Attention, then every module, then every command, of a Python that has imported nothing before.
ALONE = """
import json, torch, dape
bias, adapter, x = dape.Kerple(4), dape.DAPE(4), torch.randn(1, 4, 40, 16)
whole = dape.attention(x, x, x, bias, adapter)
last = dape.attention(x[:, :, -1:], x, x, bias, adapter, query_offset=39)
found = {"attention": (whole[:, :, -1:] - last).abs().max().item()}

from importlib import import_module
from pathlib import Path
folder, found["failed"] = Path(dape.__path__[0]), {}
for path in sorted(folder.rglob("*.py")):
    name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
    try:
        name.endswith("__main__") or import_module(name.removesuffix(".__init__"))
    except ImportError as error:
        found["failed"][name] = error.name

from dape.cli import COMMANDS, main
found["codes"] = {}
for name in ["info", *(f"{name} --help" for name in COMMANDS)]:
    try:
        found["codes"][name] = main(name.split())
    except SystemExit as end:
        found["codes"][name] = end.code
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def bare():
    """Return what a fresh Python without the packages of the extras printed, and what it found."""
    kept, owners = asked(), packages_distributions().items()
    others = {name for name, of in owners if kept.isdisjoint(map(canonicalize_name, of))}
    assert {"hypothesis", "pytest"} <= others and "rich" not in others
    # PyTorch for GPUs asks for Triton; builds for CPUs, macOS and Windows come without.
    absent = sorted(others | {"triton"})
    code = f"import sys; sys.modules |= dict.fromkeys({absent})\n{ALONE}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(run.stdout.splitlines()[-1])


def test_attention_needs_no_triton(bare):
    _, found = bare
    assert found["attention"] < 1e-5


def test_models_need_no_module_of_unix_and_files_are_refused_with_a_line(tmp_path):
    """Without fcntl, as on Windows."""
    code = f"""
import sys; sys.modules["fcntl"] = None
import warnings; warnings.simplefilter("ignore")  # huggingface_hub warns about its locks
import dape, torch
from dape.cli import main
small = dict(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
model = dape.DapeForCausalLM(dape.DapeConfig(scheme="dape-kerple", **small))
print(*model(torch.arange(9)[None]).logits.shape)
main(["plot", "encoding", "alibi", "--out", {str(tmp_path / "a.svg")!r}])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["1", "9", "9"], run.stderr
    assert run.stderr.startswith("dape: error: dape writes files on Linux and macOS alone")
    assert not any(tmp_path.iterdir())


def test_no_module_needs_an_extra_and_kernels_alone_need_triton(bare):
    _, found = bare
    assert found["failed"], "kernels need Triton"
    for name, missing in found["failed"].items():
        kernels = name.startswith("dape.attention.fused.") or name.endswith("_kernels")
        assert kernels and missing.partition(".")[0] == "triton", f"{name} needs {missing}"


def test_every_command_explains_itself_without_an_extra(bare):
    printed, found = bare
    assert len(found["codes"]) == len(COMMANDS) + 1 and not any(found["codes"].values())
    assert printed.count("usage: dape") == len(COMMANDS)


def test_tests_of_kernels_are_skipped_where_there_is_no_triton():
    """A file that cannot be imported would end the whole run."""
    code = (
        "import sys; sys.modules['triton'] = None; import pytest;"
        "sys.exit(pytest.main(['--collect-only', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    files = ["tests/test_interpreter.py", "tests/test_ranks.py"]
    command = [sys.executable, "-c", code, *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "SKIPPED [1] tests/test_interpreter.py:0: needs Triton" in run.stdout


def test_the_operator_keeps_its_name_after_its_subpackage_is_imported():
    assert import_module("dape.attention").attention is dape.attention
    assert dape.attention is import_module("dape.attention.operator").attention


def test_every_part_of_attention_can_be_imported_under_another_name():
    import dape.attention.chunked as chunked
    import dape.attention.fused.tables as tables
    import dape.attention.operator as operator

    for module in (chunked, tables, operator):
        assert module is sys.modules[module.__name__]
    folder = Path(operator.__file__).parent
    names = [path.stem for path in folder.iterdir() if path.stem.strip("_") == path.stem]
    assert all(
        getattr(dape.attention, name) is sys.modules[f"dape.attention.{name}"] for name in names
    )


@pytest.mark.parametrize("name", dape.__all__)
def test_every_public_name_is_what_it_says(name):
    assert getattr(dape, name).__name__ == name
    assert name in dir(dape)


def test_a_name_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'kerple'"):
        dape.kerple  # noqa: B018


@pytest.mark.usefixtures("beside_torch")  # where the use of one loads its module
def test_packages_of_functions_are_attributes_and_cost_nothing_until_one_is_used():
    assert imported("import dape; dape.evaluate, dape.train; 'train' in dir(dape)") == set()
    for package in (dape.evaluate, dape.train):
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
