"""The explorer: its formulas and numbers against those of the package, and its controls."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch

import dape
from browser import found_in, needs_chromium
from dape.data.shards import Corpus
from dape.data.tokenizer import byte
from dape.evaluate.capture import capture
from dape.evaluate.opening import open_model, open_models
from dape.evaluate.passage import Source, passage
from dape.figures.explore import PORTS, page, parameters
from dape.figures.view import View
from dape.model.modeling import DapeForCausalLM
from dape.positions.bias import Bias
from folders import make_run, prepare

QUERIES, KEYS = (0, 1, 7, 100, 5000), (0, 1, 5, 64, 99, 4000)
CPU = torch.device("cpu")


def moved(kind):
    """Return a bias of three heads each of whose parameters has moved."""
    torch.manual_seed(1)
    bias = kind(3)
    with torch.no_grad():
        for parameter in bias.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return bias


def content(page):
    (data,) = re.findall(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(data)


def unpacked(text):
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), "<f4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="module")
def run(folder):
    return make_run(folder / "run", prepare(folder), "dape-kerple")


@pytest.fixture(scope="module")
def read(run):
    return passage(open_model(run), Source(length=60, document=3), device=CPU)


@pytest.fixture(scope="module")
def with_model(read):
    return page(View(heads=3), read)


def test_every_bias_of_the_package_is_on_the_page():
    public = {getattr(dape, name) for name in dape.__all__}
    biases = {each for each in public if isinstance(each, type) and issubclass(each, Bias)}
    assert biases == PORTS.keys()
    kinds = {each["kind"] for each in content(page(View(heads=2)))["encodings"]}
    assert kinds == {kind.__name__ for kind in PORTS}


def test_a_bias_that_the_page_does_not_know_has_no_parameters_there():
    class Own(dape.Kerple):
        pass

    assert parameters(Own(2)) is None
    assert len(parameters(dape.Kerple(2))) == 2


@needs_chromium
def test_formulas_of_the_page_are_those_of_the_package(tmp_path):
    biases = {kind.__name__: moved(kind) for kind in PORTS}
    given = json.dumps({name: parameters(bias) for name, bias in biases.items()})
    script = f"""
      const [given, queries, keys] = [{given}, {list(QUERIES)}, {list(KEYS)}];
      return Object.fromEntries(Object.entries(given).map(([name, heads]) => [name, heads.map(
        (head) => queries.map((i) => keys.map((j) => BIASES[name](head)(i, j))))]));"""
    found = found_in(page(View(heads=2)), script, tmp_path)
    for name, bias in biases.items():
        wide = bias.double()
        with torch.no_grad():
            expected = wide(torch.tensor(QUERIES), torch.tensor(KEYS))
        # A fixed slope and Sandwich's sum are float32 in the package.
        rtol = 1e-6 if name in ("ALiBi", "Sandwich") else 1e-12
        np.testing.assert_allclose(found[name], expected, rtol=rtol, atol=rtol, err_msg=name)


def test_numbers_of_the_page_are_those_of_a_row_of_the_model(run, with_model):
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    corpus = Corpus(run.parent / "data")
    tokens = torch.from_numpy(corpus.split("test").document(3)[:60])
    (layer,) = content(with_model)["passage"]["layers"]
    for query in (0, 44, 59):
        (row,) = capture(model, tokens, query=query)
        pairs = slice(query * (query + 1) // 2, (query + 1) * (query + 2) // 2)
        for name, values in (("A", row.scores), ("B", row.bias), ("f", row.change)):
            found = unpacked(layer[name]).reshape(2, 60 * 61 // 2)[:, pairs]
            np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_layer_has_its_own_bias_and_the_text_is_of_the_split_asked_for(run):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = dape.DapeConfig(scheme="dape-concat-kerple", vocab_size=257, **sizes)
    network = dape.DapeForCausalLM(config)
    (model,) = open_models(network, byte())
    (layer,) = passage(model, Source(text="abc"), layers=[2], device=CPU).layers
    own = network.model.layers[2].self_attn.position_bias
    assert layer.layer == 2 and torch.equal(layer.module.raw_p, own.raw_p) and not layer.residual
    assert not torch.equal(own.raw_p, network.model.layers[0].self_attn.position_bias.raw_p)
    network = dape.DapeForCausalLM(dape.DapeConfig(scheme="rope", vocab_size=257, **sizes))
    (model,) = open_models(network, byte())
    (_, layer, _) = passage(model, Source(text="abc"), device=CPU).layers
    assert layer.layer == 1 and layer.module is None and layer.residual and not layer.bias.any()
    found = passage(open_model(run), Source(length=20, split="validation"), device=CPU)
    text = (run.parent / "text" / "validation" / "0.txt").read_bytes()[:20]
    letters = [letter for letter in found.tokens if len(letter) == 1]
    assert "".join(letters) == text.decode("ascii", errors="ignore")


def test_tokens_are_the_text_and_a_part_of_a_character_is_named(run):
    text = "ab\n \u00e9 c"
    found = passage(open_model(run), Source(text=text), device=CPU)
    assert found.tokens == ["a", "b", "\n", " ", "<0xC3>", "<0xA9>", " ", "c"]
    assert found.origin == "text given"
    with pytest.raises(dape.UserError, match="fewer than 2 tokens"):
        passage(open_model(run), Source(text="a"), device=CPU)
    assert passage(open_model(run), Source(text="ab"), device=CPU).tokens == ["a", "b"]
    assert passage(open_model(run), Source(2, text="abc"), device=CPU).tokens == ["a", "b"]


def test_the_bias_mounted_in_a_pretrained_model_is_on_the_page():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    dape.retrofit(model, bias="kerple")
    (opened,) = open_models(model, byte())
    found = content(page(View(heads=3), passage(opened, Source(text="a text"), device=CPU)))
    (kerple,) = (each for each in found["encodings"] if each["name"] == "kerple")
    assert [len(each["heads"]) for each in kerple["sets"]] == [3, 4, 4]
    assert [each["heads"] for each in found["passage"]["layers"]] == [4, 4]


@needs_chromium
def test_the_attention_of_the_page_is_that_of_the_model(run, with_model, tmp_path):
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    tokens = torch.from_numpy(Corpus(run.parent / "data").split("test").document(3)[:60])
    with torch.no_grad():
        (weights,) = model(input_ids=tokens[None], output_attentions=True).attentions
    script = """
      const [layer] = content.passage.layers;
      return [0, 1].map((head) => [3, 59].map((query) => rowOf(layer, head, query).attention));"""
    found = found_in(with_model, script, tmp_path)
    for head in (0, 1):
        for place, query in enumerate((3, 59)):
            expected = weights[0, head, query, : query + 1]
            np.testing.assert_allclose(found[head][place], expected, rtol=1e-4, atol=1e-6)


CONTROLS = """
  const set = (id, value, kind = "change") => {
    element(id).value = value;
    element(id).dispatchEvent(new Event(kind));
  };
  const names = content.encodings.map((each) => each.name);
  const first = [names[element("encoding").value], element("set").selectedOptions[0].text];
  const drawn = {};
  for (const [n, name] of names.entries()) {
    set("encoding", n);
    set("head", 1);
    const lines = element("lines").querySelectorAll("polyline").length;
    drawn[name] = [lines, current.drawn.values.length];
  }
  set("encoding", names.indexOf("t5"));
  const [range] = element("sliders").querySelectorAll("input[type=range]");
  range.value = 40;
  range.dispatchEvent(new Event("input"));
  const bars = element("sliders").querySelectorAll(".bars input");
  bars[3].value = 1.5;
  bars[3].dispatchEvent(new Event("input"));
  const t5 = [bars.length, current.drawn.values[3]];
  set("encoding", names.indexOf("alibi"));
  set("value-s", 0.25);
  set("positions", 64);
  const alibi = [current.drawn.values.at(-1), element("map").width, element("half").textContent];
  element("keep").click();
  set("value-s", 0.5);
  const kept = [element("lines").querySelectorAll("polyline").length, element("kept").textContent];
  element("forget").click();
  const forgotten = element("lines").querySelectorAll("polyline").length;
  element("tokens").children[7].click();
  set("model-head", 1, "input");
  const shown = {};
  for (const name of ["attention", "A", "B", "f", "logits"]) {
    set("shown", name, "input");
    shown[name] = element("tokens").children[7].title;
  }
  return { first, drawn, t5, alibi, kept, forgotten, shown,
    query: element("query").value, later: document.querySelectorAll(".later").length,
    top: element("top").rows.length, square: element("square").width,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth };
"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_every_control_draws_and_nothing_is_wider_than_the_window(
    with_model, tmp_path, width, dark
):
    found = found_in(with_model, CONTROLS, tmp_path, width, dark)
    assert found["first"] == ["kerple", "layer 0 of the model"]
    names = {each["name"] for each in content(with_model)["encodings"]}
    assert found["drawn"] == {name: [1, 512] for name in names}
    assert found["t5"] == [40, 1.5]
    # Weights e^(-d / 4): those of 0, 1 and 2 tokens are 0.22 (1 + 0.78 + 0.61) = 0.53 of all.
    assert found["alibi"] == [-0.25 * 63, 64, "Half of the attention lies within distance 2."]
    assert found["kept"] == [2, "alibi, head 1"] and found["forgotten"] == 1
    assert (found["query"], found["later"], found["top"]) == ("7", 52, 9)
    assert len(set(found["shown"].values())) == 1 and found["square"] == 60
    assert found["wide"] == 0


def test_the_page_names_nothing_outside_itself(with_model):
    assert not re.search(r"""\b(src|href)=|url\(|@import|https?://""", with_model)
