"""The how-tos of CONTRIBUTING.md, followed to the letter in a copy, leave the tests green."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT, blocks

# Those that look at every scheme by itself, and of the others what concerns the new ones.
LOOKING = (
    *(
        "tests/docs/test_encodings.py",
        "tests/figures/test_style.py",
        "tests/evaluate/test_compare.py",
    ),
    *("tests/figures/test_bias_maps.py", "tests/cli/test_info.py", "tests/positions"),
    *("tests/model/test_schemes.py", "tests/model/test_packing.py", "tests/test_formula.py"),
)
FORMULA = """
import pytest
import torch

import dape
from dape.attention.fused import table_operators as operators
from dape.attention.fused.tables import tables
from dape.positions.adapter import Temperature
from dape.positions.bias import SquareRoot


def test_square_root():
    module = SquareRoot(num_heads=3).double()
    i, j = torch.tensor([4, 9]), torch.tensor([0, 4])
    roots = torch.tensor([[2, 0], [3, 5**0.5]], dtype=torch.float64)
    expected = torch.stack([-roots / h for h in (1, 2, 3)])
    torch.testing.assert_close(module(i, j), expected, rtol=1e-6, atol=0)


def test_the_form_of_square_root():
    table = []
    for tabled in (True, False):
        module = SquareRoot(num_heads=3)
        if tabled:
            assert operators.form_of(module)[0].endswith("SquareRoot")
            (values,) = tables(module, None, 3, 40, torch.device("cpu"))
        else:
            values = module(torch.arange(40), torch.arange(1))[..., 0]
        (values * torch.linspace(-1, 2, 40)).sum().backward()
        table.append((values, module.strength.grad))
    for found, expected in zip(*table, strict=True):
        torch.testing.assert_close(found, expected)


def test_double():
    tensors = torch.randn(3, 1, 2, 5, 4).bfloat16()
    found = dape.attention(*tensors, backend="double")
    expected = dape.attention(*tensors.double(), backend="reference").bfloat16()
    assert torch.equal(found, expected)
    with pytest.raises(dape.UserError, match="'double' cannot serve this call: its scores"):
        dape.attention(*torch.zeros(3, 1, 1, 4097, 1), backend="double")


def test_temperature():
    module = Temperature(num_heads=2).double()
    torch.nn.init.constant_(module.weight, 0.5)
    scores, bias = torch.randn(2, 1, 2, 3, 4).double()
    assert torch.equal(module(scores, bias[0]), 1.5 * (scores + bias[0]))
    config = dape.DapeConfig(
        scheme="rope", vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=3
    )
    dape.retrofit(dape.DapeForCausalLM(config), "temperature")
"""


def insert(path, text, before):
    """Put a text before the one place where another stands."""
    whole = path.read_text()
    assert whole.count(before) == 1, before
    path.write_text(whole.replace(before, text + before))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the repository in which both how-tos were followed."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("src", "tests", "docs", "recipes", "results"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, folder / name)
    positions, page = folder / "src/dape/positions", folder / "docs/encodings.md"
    bias, base, *form, adapter, before, backend, entry = blocks("CONTRIBUTING.md", "python")
    bias_section, adapter_section = blocks("CONTRIBUTING.md", "markdown")
    for file, code in (("bias.py", bias), ("adapter.py", adapter)):
        with (positions / file).open("a") as end:
            end.write(f"\n\n{code}")
    scheme = positions / "scheme.py"
    insert(
        scheme,
        f"        {base.rstrip()},\n",
        before="    )\n}\n# The other forms of the DAPE paper",
    )
    insert(scheme, f"        {before.rstrip()},\n", before="    )\n}\n\n\ndef fits(")
    for module, name in (("adapter", "Temperature"), ("bias", "SquareRoot")):
        line = re.search(f"from dape.positions.{module} import .*\n", scheme.read_text()).group()
        insert(scheme, line.replace("import", f"import {name},"), before=line)
        scheme.write_text(scheme.read_text().replace(line, "", 1))
    insert(page, f"{bias_section}\n", before="## Adapters\n")
    page.write_text(f"{page.read_text()}\n{adapter_section}")
    follow_the_kernels(folder / "src/dape/attention", *form, backend, entry)
    (folder / "tests" / "test_formula.py").write_text(FORMULA)
    return folder


def follow_the_kernels(attention, function, form, backend, entry):
    """Add the form of the new bias, and the new backend."""
    forms, select = attention / "fused/forms.py", attention / "select.py"
    insert(forms, f"{function}\n\n", before="FORMS: dict")
    insert(forms, f"    {form.rstrip()}\n", before="}\n")
    insert(forms, "from dape.positions.bias import SquareRoot\n", before="\n\nclass Form(")
    (attention / "double.py").write_text(backend)
    insert(select, f"    {entry.rstrip()}\n", before="}\nNOT_GIVEN")
    insert(select, "from dape.attention import double\n", before="from dape.errors")


def run(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_following_both_how_tos_leaves_the_tests_green(copy):
    chosen = "not (test_schemes or test_packing or positions) or square or temperature or forms"
    found = run(copy, "pytest", "-vv", "-p", "no:cacheprovider", "-k", chosen, *LOOKING)
    for name in ("square-root", "dape3-square-root", "temperature-kerple"):
        assert re.search(rf"test_a_cache_changes_nothing\[{name}\] PASSED", found)


def test_the_code_of_both_is_formatted_and_typed_as_ours(copy):
    changed = [f"src/dape/positions/{name}.py" for name in ("bias", "adapter", "scheme")]
    kernels = [f"src/dape/attention/{name}.py" for name in ("double", "fused/forms", "select")]
    run(copy, "ruff", "check", "--ignore", "I001", *changed, *kernels)
    run(copy, "ruff", "format", "--check", *changed[:2], *kernels[:2])
