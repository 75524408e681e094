"""What stands in a document as code, and its execution as it stands."""

import re
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path

import nbformat
import yaml

from dape import cli

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SMALL = {
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "training": {"batch_size": 4, "steps": 2, "precision": "fp32"},
    "hardware": {"device": "cpu", "micro_batch_size": 1},
    "tracking": {"validation_batches": 1},
}


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def markdown(page):
    """Return a page as Markdown; of a notebook the cells that are no code."""
    if not page.endswith(".ipynb"):
        return text(page)
    cells = nbformat.reads(text(page), as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def blocks(page, language):
    """Return the fenced blocks of a language; those without one are no code to run."""
    return [code for name, code in BLOCK.findall(text(page)) if name == language]


def execute(page):
    """Run the blocks of Python and of commands in their order, and return the names of Python."""
    names = {}
    for language, code in BLOCK.findall(text(page)):
        if language == "python":
            exec(code, names)
        elif language == "sh":
            for line in code.replace("\\\n", "").splitlines():
                command(shlex.split(line, comments=True))
    return names


def command(words):
    """Run a command as a shell would; `dape` in this process, which has it imported."""
    if not words:
        return
    program, *words = (each for word in words for each in expanded(word))
    if program == "dape":
        assert not cli.main(words), shlex.join(words)
    else:
        assert program == "torchrun"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
        done = subprocess.run(launch, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def expanded(word):
    return sorted(glob(word)) if "*" in word else [word]


def small_recipe(name, folder, **sections):
    """Write the recipe `recipes/NAME` into a folder, under the same name, of a size for a test."""
    recipe = yaml.safe_load(text(f"recipes/{name}"))
    for section, values in {**SMALL, **sections}.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / name).write_text(yaml.safe_dump(recipe))
