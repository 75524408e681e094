"""The map of a trained encoder, against the formula of its first layer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cells import small

from dape import cli
from dape.chomsky import maps
from dape.chomsky import run as runs
from dape.chomsky.cell import load_model
from dape.chomsky.maps import load
from dape.chomsky.measure import TEST
from dape.chomsky.task import single
from dape.chomsky.tasks import TASKS
from dape.evaluate.capture import Row
from dape.figures import chomsky_map

SCHEMES = ("kerple", "alibi", "dape-kerple", "randomized-rope")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chomsky")
    benchmark = small(folder, tasks=("binary-addition",), schemes=SCHEMES, seeds=(0,))
    runs.run(benchmark, torch.device("cpu"), lambda *_: None, [])
    return folder


def made(folder, scheme, *more, length="7"):
    words = ("binary-addition", "--scheme", scheme, "--length", length, "--examples", "3")
    out = folder / f"{scheme}.json"
    files = ("--out", str(out), *more)
    assert not cli.main(["chomsky", "map", str(folder), "--task", *words, *files])
    return load(out)


def test_lines_are_those_of_the_formula(folder):
    """Softmax of A + B + f(A, B) in the first layer, all in float64, mean over the examples."""
    found = made(folder, "dape-kerple")
    task = TASKS["binary-addition"]
    inputs = task.sample(single(TEST + 7, 3), 7).inputs
    encoder = load_model(folder, "binary-addition", "dape-kerple", 0).double()
    attention = encoder.layers[0].self_attn
    tokens = torch.nn.functional.pad(inputs, (0, 8), value=3)
    x = encoder.embed_tokens.weight.T[tokens] * 16**0.5
    q, k = (
        (x @ projection.weight.T).view(3, 15, 2, 8).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    scores = (q @ k.mT / 8**0.5)[:, :, 10].detach()
    bias = attention.position_bias(torch.tensor([10]), torch.arange(15))[:, 0].double().detach()
    assert bias[0, 10] == 0 and torch.all(bias[:, 11:] == bias[:, 6:10].flip(1))
    change = attention.adapter(scores[:, :, None], bias[:, None]).squeeze(2) - scores - bias
    layer = found.layers[0]
    assert found.query == 10 and found.inputs == 7 and found.trained == 4
    for name, value in {
        "scores": scores,
        "bias": bias.expand(3, -1, -1),
        "change": change.detach(),
        "weights": (scores + bias + change).softmax(-1).detach(),
    }.items():
        np.testing.assert_allclose(getattr(layer, name), value.mean(0), rtol=2e-3, atol=1e-5)
    assert layer.spread["scores"] == pytest.approx(
        float(scores[:, :, :7].std(-1, correction=0).mean()), rel=2e-3
    )
    pairs = [
        np.corrcoef(change[e, h, :7].detach(), scores[e, h, :7])[0, 1]
        for e in range(3)
        for h in range(2)
    ]
    assert layer.with_scores == pytest.approx(np.mean(pairs), rel=2e-3)


@pytest.mark.parametrize("scheme", ["kerple", "alibi"])
def test_without_an_adapter_nothing_is_added(folder, scheme):
    """The rounding of A + B is no f, and has no correlation."""
    (layer,) = made(folder, scheme, length="60").layers
    assert np.abs(layer.bias).max() > 1 and not np.any(layer.change)
    assert layer.spread["change"] == 0 and layer.with_scores is None and layer.with_bias is None


def test_a_constant_f_is_kept_without_its_rounding():
    generator = np.random.default_rng(0)
    scores, bias = generator.normal(size=(2, 2, 50)).astype(np.float32) * 5
    row = Row(0, True, scores, bias, scores + bias + np.float32([[3.0], [0.0]]))
    assert np.ptp(row.change, axis=1).min() > 0
    layer = maps._layer([row], 50)
    np.testing.assert_allclose(layer.change, np.repeat([[3.0], [0.0]], 50, 1), rtol=1e-4)
    assert layer.spread["change"] < 1e-12
    assert layer.with_scores is None and layer.with_bias is None


def test_the_figure_and_the_table_have_a_row_a_layer(folder):
    record = made(folder, "dape-kerple", str(folder / "map.md"), str(folder / "map.svg"))
    assert record == load(folder / "dape-kerple.json")
    assert json.loads((folder / "dape-kerple.json").read_text())["provenance"]["command"]
    figure = chomsky_map.draw(record)
    assert len(figure.axes) == 4 and len(figure.axes[0].lines) == 3  # two heads and the query
    assert (folder / "map.svg").read_text().startswith("<?xml")
    (row,) = chomsky_map.table(record).rows
    assert row[-1] == f"{np.array(record.layers[0].weights)[:, :7].sum(1).mean():.0%}"
    assert "| 0 |" in (folder / "map.md").read_text()
    assert set(figure.axes[0].lines[-1].get_xdata()) == {record.query}
    spread = {"scores": 1.0, "bias": 2.0, "change": 3.0}
    layer = replace(record.layers[0], spread=spread, with_scores=0.25, with_bias=-0.5)
    (row,) = chomsky_map.table(replace(record, layers=[layer])).rows
    assert row[:6] == ["0", "1", "2", "3", "+0.25", "-0.50"]


def test_models_that_are_not_there_are_one_line(folder, capsys):
    words = ["chomsky", "map", str(folder), "--task", "even-pairs", "--scheme", "kerple"]
    assert cli.main([*words, "--out", str(folder / "x.json")]) == 2
    assert "even-pairs/kerple-0.json" in capsys.readouterr().err
    words[4:] = ["binary-addition", "--scheme", "randomized-rope"]
    assert cli.main([*words, "--out", str(folder / "x.json")]) == 2
    assert "positions are random" in capsys.readouterr().err


def test_damaged_parameters_and_absent_models_are_one_line(folder, capsys):
    words = ["chomsky", "map", str(folder), "--task", "binary-addition", "--out", "a.json"]
    file = folder / "models" / "binary-addition" / "kerple-0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert cli.main([*words, "--scheme", "kerple"]) == 2
    assert "cannot read" in capsys.readouterr().err
    file.write_bytes(whole)
    assert cli.main([*words, "--scheme", "fire"]) == 2
    assert "fire-0.json is missing; train it by `dape chomsky train`" in capsys.readouterr().err
