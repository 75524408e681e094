"""The plan of benchmarks/smollm2.py: the command line takes every command of it, each once."""

import importlib.util
from pathlib import Path

from dape.cli import eval as evaluation
from dape.cli import eval_retrieval, retrofit
from dape.cli.arguments import parse

FILE = Path(__file__).parents[2] / "benchmarks" / "smollm2.py"


def test_the_command_line_takes_the_plan(monkeypatch):
    monkeypatch.chdir(FILE.parents[1])
    spec = importlib.util.spec_from_file_location("smollm2", FILE)
    smollm2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smollm2)
    planned = smollm2.commands()
    assert len({written for written, _ in planned}) == len(planned)
    tuned = 0
    for written, (program, command, *words) in planned:
        assert program == "dape"
        if command == "retrofit":
            found, tuned = retrofit.read(words), tuned + 1
            assert found.recipe.folder == written.parents[1]
            assert found.recipe.training.length == 16_384 and found.lengths[-1] == 65_536
            tokens = found.recipe.training.length * found.recipe.training.batch_size
            assert tokens * found.recipe.training.steps == 26_214_400
        elif command == "eval":
            kind = eval_retrieval if words[0] == "retrieval" else evaluation
            found = parse(kind.Arguments, words[kind is eval_retrieval :], "dape eval")
            assert found.runs[-1] == written.parents[1]
    assert tuned == len(smollm2.ARMS) * len(smollm2.SEEDS)
