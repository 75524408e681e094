"""Exported programs, of PyTorch and of ONNX, serve any batch and any length."""

import warnings

import pytest
import torch
from models import fresh, grown, tokens
from pretrained import of_one_layer, pretrained
from torch.export import Dim, export
from torch.testing import assert_close
from torch.torch_version import TorchVersion

import dape
from dape.attention import chunked, reference
from dape.errors import UserError
from dape.positions import scheme

# Parts that add to the scores or stand before them, in one layer each: a trace takes seconds.
NAMES = [name for name, base in scheme.BASES.items() if base.rotation is None]
NAMES += ["rope", "dynamic-ntk", "dape-kerple", "dape3-fire", "talking-heads-alibi"]
LENGTHS = (2, 5, 40)
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.skipif(
        torch.__version__ < reference.EXPORTS, reason="a free length, which this PyTorch refuses"
    ),
]


class Logits(torch.nn.Module):
    """A model as a function of tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits


def free(most=None):
    """Return free sizes of the batch and the length, the latter up to `most`."""
    return {0: Dim("batch"), 1: Dim("length", max=most)}


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_reads_any_length(name):
    model = Logits(grown(scheme=name, train_length=64, num_hidden_layers=1).requires_grad_(False))
    most = 64 if name == "learned" else None  # as long as its table
    program = export(model, (tokens(2, 9),), dynamic_shapes=(free(most),)).module()
    for length in LENGTHS:
        ids = tokens(3, length)
        assert_close(program(ids), model(ids), rtol=1e-9, atol=1e-9)


def test_an_older_pytorch_refuses_a_free_length_in_a_line(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    model = Logits(grown(scheme="kerple", num_hidden_layers=1).requires_grad_(False))
    export(model, (tokens(2, 9),))
    with pytest.raises(UserError, match=r"PyTorch 2.13 .* this is 2.12.1; export a fixed length$"):
        export(model, (tokens(2, 9),), dynamic_shapes=(free(),))


def test_an_exported_model_takes_padding(monkeypatch):
    monkeypatch.setitem(chunked.SCORES_PER_BLOCK, "cpu", 100)  # several blocks, which none exports
    model = grown(scheme="dape-fire", backend="chunked", num_hidden_layers=1)
    model = Logits(model.requires_grad_(False))
    given = (tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    program = export(model, given, dynamic_shapes=(free(), free())).module()
    for length in LENGTHS:
        ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.long)
        mask[0, : length // 2] = 0
        assert_close(program(ids, mask), model(ids, mask), rtol=1e-9, atol=1e-9)


def test_an_exported_model_tells_documents_apart_by_their_positions():
    model = grown(scheme="dape-kerple", backend="reference", num_hidden_layers=1)
    model = Logits(model.requires_grad_(False))
    given = (tokens(2, 9), None, torch.arange(9).expand(2, -1))
    program = export(model, given, dynamic_shapes=(free(), None, free())).module()
    for length in LENGTHS:
        ids, positions = tokens(3, length), torch.arange(length).expand(3, -1) % 4
        expected = torch.cat([model(part) for part in ids.split(4, dim=1)], dim=1)
        assert_close(program(ids, None, positions), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_retrofitted_model_is_exported_with_its_adapters(name):
    model = of_one_layer(pretrained(name, torch.float64))
    mounted = dape.retrofit(model, bias="kerple")
    for parameter in mounted.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = Logits(model.requires_grad_(False))
    program = export(model, (tokens(2, 9),), dynamic_shapes=(free(64),)).module()
    for length in LENGTHS:
        ids = tokens(3, length)
        assert_close(program(ids), model(ids), rtol=1e-9, atol=1e-9)


def test_an_exported_model_reads_positions_that_begin_anywhere():
    model = of_one_layer(pretrained("llama", torch.float64))
    mounted = dape.retrofit(model, bias="fire")
    for parameter in mounted.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = Logits(model.requires_grad_(False))
    given = (tokens(2, 9), None, torch.arange(9).expand(2, -1))
    program = export(model, given, dynamic_shapes=(free(), None, free())).module()
    for length in LENGTHS:
        ids, positions = tokens(3, length), torch.arange(length).expand(3, -1) + 30
        expected = model(ids, None, positions)
        assert_close(program(ids, None, positions), expected, rtol=1e-9, atol=1e-9)


def hidden_between(rows, length):
    """Return a mask that hides the first token of a row, and one between visible tokens of each."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, length // 2] = mask[0, 0] = 0
    return mask


@pytest.mark.parametrize("name", ["rope", "llama"])
def test_an_exported_model_leaves_out_tokens_hidden_between_visible_ones(name):
    if name == "llama":
        model = of_one_layer(pretrained(name, torch.float64))
        mounted = dape.retrofit(model, bias="kerple")
        for parameter in mounted.adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    else:
        model = grown(scheme=name, num_hidden_layers=1)
    model = Logits(model.requires_grad_(False))
    given = (tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    program = export(model, given, dynamic_shapes=(free(), free())).module()
    for length in LENGTHS[1:]:
        ids, mask = tokens(3, length), hidden_between(3, length)
        shown = mask.bool()
        assert_close(program(ids, mask)[shown], model(ids, mask)[shown], rtol=1e-9, atol=1e-9)


def in_onnx(model, given, shapes, path):
    """Return the function of arguments by name that an ONNX file computes."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about PyTorch's own insides
        torch.onnx.export(model, given, path, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path)

    def run(**arguments):
        (out,) = session.run(None, {name: each.numpy() for name, each in arguments.items()})
        return torch.from_numpy(out)

    return run


def test_an_onnx_file_has_the_logits_of_the_model(tmp_path):
    model = Logits(fresh(scheme="dape-kerple", num_hidden_layers=1)).eval()
    run = in_onnx(model, (tokens(2, 9),), (free(),), tmp_path / "model.onnx")
    for length in LENGTHS:
        ids = tokens(3, length)
        assert_close(run(input_ids=ids), model(ids), rtol=1e-5, atol=1e-5)


def test_an_onnx_file_leaves_out_hidden_tokens_wherever_they_lie(tmp_path):
    model = Logits(grown(scheme="rope", num_hidden_layers=1).float().requires_grad_(False))
    given = (tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    run = in_onnx(model, given, (free(), free()), tmp_path / "model.onnx")
    for length in LENGTHS[1:]:
        ids, mask = tokens(3, length), hidden_between(3, length)
        out, shown = run(input_ids=ids, attention_mask=mask), mask.bool()
        assert_close(out[shown], model(ids, mask)[shown], rtol=1e-5, atol=1e-5)
        mask = mask.cumsum(-1).clamp(max=1)  # padding on the left
        out, shown = run(input_ids=ids, attention_mask=mask), mask.bool()
        assert_close(out[shown], model(ids, mask)[shown], rtol=1e-5, atol=1e-5)


def test_an_onnx_file_of_cope_tells_documents_apart(tmp_path):
    model = Logits(grown(scheme="cope", num_hidden_layers=1).float().requires_grad_(False))
    given = (tokens(2, 9), None, torch.arange(9).expand(2, -1))
    run = in_onnx(model, given, (free(), None, free()), tmp_path / "model.onnx")
    ids, lengths = tokens(3, 12), (5, 3, 12)
    found = run(input_ids=ids, position_ids=torch.arange(12) % torch.tensor(lengths)[:, None])
    for row, length in enumerate(lengths):
        alone = [model(part)[0] for part in ids[row : row + 1].split(length, dim=1)]
        assert_close(found[row], torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_an_onnx_file_of_transformer_xl_leaves_out_hidden_tokens(tmp_path):
    name = "transformer-xl"
    model = Logits(grown(scheme=name, num_hidden_layers=1).float().requires_grad_(False))
    given = (tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    run = in_onnx(model, given, (free(), free()), tmp_path / "model.onnx")
    ids, mask = tokens(3, 12), hidden_between(3, 12)
    mask[1, :5] = mask[2, 7:] = 0
    found = run(input_ids=ids, attention_mask=mask)
    for row, shown in enumerate(mask.bool()):
        left = model(ids[row : row + 1, shown])[0]
        assert_close(found[row, shown], left, rtol=1e-4, atol=1e-4)


def test_an_onnx_file_of_a_classifier_reads_the_last_visible_token(tmp_path):
    config = grown(scheme="dape-kerple", num_hidden_layers=1).config
    config.num_labels, config.pad_token_id = 3, 0
    made = dape.DapeForSequenceClassification(config)
    model = Logits(made.eval().requires_grad_(False))
    given = (tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    run = in_onnx(model, given, (free(), free()), tmp_path / "model.onnx")
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    assert_close(run(input_ids=ids, attention_mask=mask), model(ids, mask), rtol=1e-5, atol=1e-5)
    assert_close(model(ids, mask)[1:2], model(ids[1:2, :7], mask[1:2, :7]))


@pytest.mark.filterwarnings("ignore")  # of the tracer, about its age
def test_a_graph_without_checks_refuses_what_a_check_would(tmp_path):
    model = Logits(fresh(scheme="dape3-kerple", num_hidden_layers=1).requires_grad_(False))
    given = (tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    with pytest.raises(UserError, match=r"keep no check of values; .*attention_mask hides tokens"):
        torch.jit.trace(model, given, check_trace=False)
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=r"keep no check of values; .*attention_mask hides tokens"):
        torch.onnx.export(model, given, tmp_path / "model.onnx", verbose=False)
