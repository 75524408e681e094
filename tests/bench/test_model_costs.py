"""`dape bench model`: what it times is the model's own loss and logits, and its tables add up."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from dape import DapeConfig, DapeForCausalLM, cli
from dape.bench import clock, model
from dape.bench.case import FORWARD, TRAINING
from dape.bench.record import Entry, Missing
from dape.cli.bench_attention import origin
from dape.errors import UserError
from dape.figures.costs import tables
from dape.train.recipe import Recipe, read

GIB = 2**30
RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ("--device", "cpu", "--vocab-size", "13", "--lengths", "6,12", "--sizes", "tiny")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(clock, "BUDGET", 0)
    monkeypatch.setitem(model.SIZES, "tiny", model.Size(layers=2, width=8, heads=2))


def drawn():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return DapeForCausalLM(DapeConfig(vocab_size=13, scheme="dape-kerple", **sizes)).eval()


def test_the_steps_are_the_gradient_of_the_loss_and_the_last_logits():
    made, tokens = drawn(), torch.randint(13, (2, 9))
    logits = made(input_ids=tokens).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    wanted = parameters_to_vector(each.grad for each in made.parameters())
    torch.testing.assert_close(parameters_to_vector(model.train(made, tokens)), wanted)
    torch.testing.assert_close(model.read(made, tokens), logits)


def test_a_forward_pass_has_logits_of_the_last_tokens_alone(monkeypatch):
    assert model.LOGITS == 256
    monkeypatch.setattr(model, "LOGITS", 4)
    made, tokens = drawn(), torch.randint(13, (2, 9))
    torch.testing.assert_close(model.read(made, tokens), made(input_ids=tokens).logits[:, -4:])


def test_passes_that_are_timed_keep_no_cache():
    made, tokens, asked = drawn(), torch.randint(13, (2, 9)), []
    made.register_forward_pre_hook(lambda *call: asked.append(call[-1]), with_kwargs=True)
    model.read(made, tokens), model.train(made, tokens)
    assert [each["use_cache"] for each in asked] == [False, False]


def test_the_next_token_alone_is_timed_and_the_cache_counts_in_the_peak(monkeypatch):
    made, tokens, found = drawn(), torch.randint(13, (2, 9)), []
    timing = clock.Timing([1.0], 1, clock.WALL, peak=100)

    def by_wall_clock(call, device):
        found.append(call())
        return timing

    monkeypatch.setattr(model, "by_wall_clock", by_wall_clock)
    keys_and_values, layers, sequences, kept, width = 2, 2, 2, 8, 8
    cache = keys_and_values * layers * sequences * kept * width * 4
    assert model._next(made, tokens) == timing._replace(peak=100 + cache)
    torch.testing.assert_close(found[0], made(input_ids=tokens).logits[:, -1:])


def plan(**changes):
    asked = {"sizes": ("tiny",), "schemes": ("nope",), "forms": ("fused",), "lengths": (6,)}
    asked |= {"batch": 2, "directions": model.DIRECTIONS, "vocab_size": 13, "seed": 0}
    return model.Plan(**asked | changes, device=torch.device("cpu"))


@pytest.mark.parametrize(("form", "backend"), [("fused", "auto"), ("textbook", "reference")])
def test_the_model_is_the_one_of_the_row(form, backend):
    asked = model.SIZES["tiny"], "dape-kerple", form
    made = model._build(plan(), *asked)
    assert (made.config.scheme, made.config.backend) == ("dape-kerple", backend)
    wanted = drawn().state_dict()
    for name in wanted:
        if "adapter" in name and name.endswith(("weight_out", "bias_out")):
            assert wanted[name].any()
            wanted[name] = torch.zeros_like(wanted[name])
    torch.testing.assert_close(made.state_dict(), wanted)
    assert made.config.num_attention_heads == 2 and not made.training
    assert model._build(plan(), asked[0], "nope", form).config.scheme == "nope"
    other = model._build(plan(seed=1), *asked)
    assert not torch.equal(other.lm_head.weight, made.lm_head.weight)


@pytest.mark.parametrize("scheme", ["dape-alibi", "dape3-kerple"])
def test_adapters_leave_the_logits_as_they_are(scheme):
    """In training a new layer over ALiBi asks for slower kernels, of large numbers."""
    made = model._build(plan(), model.SIZES["tiny"], scheme, "textbook")
    bias = model._build(plan(), model.SIZES["tiny"], scheme.split("-")[1], "textbook")
    bias.load_state_dict(made.state_dict(), strict=False)
    tokens = torch.randint(13, (1, 40))
    torch.testing.assert_close(made(tokens).logits, bias(tokens).logits)


def test_each_direction_times_its_own_pass(monkeypatch):
    log, timing = [], clock.Timing([3.0], 1, clock.WALL)

    def note(name):
        monkeypatch.setattr(model, name, lambda _, tokens: log.append((name, tokens)) or timing)

    monkeypatch.setattr(model, "measure", lambda calls, device: calls[0]())
    named = {FORWARD: "read", TRAINING: "train", model.NEXT: "_next"}
    for name in named.values():
        note(name)
    for direction, name in named.items():
        entry = model._entry(plan(), drawn(), "nope", 7, direction)
        assert (entry.method, entry.length, entry.batch) == ("nope", 7, 2)
        assert (entry.direction, entry.milliseconds) == (direction, 3.0)
        ((found, tokens),) = log
        assert found == name and tokens.shape == (2, 7) and 0 <= tokens.min() <= tokens.max() < 13
        log.clear()


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "results.json"
    model.Costs(1, 0, {}, format=2).save(path)
    with pytest.raises(UserError, match="not costs of format 1"):
        model.load(path)


@pytest.mark.parametrize("length", [1, 9])
def test_the_next_token_has_the_logits_of_the_whole_pass_every_time(length):
    made, tokens = drawn(), torch.randint(13, (2, length))
    logits = made(input_ids=tokens).logits[:, -1:]
    cache = model.cache_of(made, tokens[:, :-1])
    for _ in range(3):
        torch.testing.assert_close(model.continued(made, tokens[:, -1:], cache), logits)
        assert cache.get_seq_length() == length - 1


def test_every_model_is_measured_at_every_length(tmp_path, capsys):
    words = ("--schemes", "nope,dape-kerple", "--forms", "fused,textbook", "--out", str(tmp_path))
    words += ("--directions", "all")
    assert cli.main(["bench", "model", *TINY, *words]) == 0
    found = model.load(tmp_path / "results.json")
    places = {
        (cost.entry.method, cost.form, cost.entry.length, cost.entry.direction)
        for cost in found.costs
    }
    assert len(places) == len(found.costs) == 2 * 2 * 2 * 3
    assert all(cost.entry.milliseconds > 0 for cost in found.costs)
    one = found.find("tiny", "dape-kerple", "textbook", 12, "forward")
    assert one.weights == 4 * sum(each.numel() for each in drawn().parameters())
    page = (tmp_path / "table.md").read_text()
    rows = re.findall(r"^\| dape-kerple, textbook \| .*$", page, re.MULTILINE)
    assert len(rows) == 3 and "nan" not in page
    assert "On a CPU all is float32, and memory is not measured." in page
    assert json.loads((tmp_path / "results.json").read_text())["provenance"]["command"].startswith(
        "dape bench model"
    )


def test_sizes_are_those_of_the_recipes():
    for name in model.SIZES.keys() - {"small", "tiny"}:
        sizes = read(RECIPES / f"{name}.yaml", Recipe).model
        found = sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads
        assert model.Size(*found) == model.SIZES[name]


def test_ratios_and_memory_of_the_tables():
    entries = {
        ("nope", "fused"): Entry("nope", 512, 1, "forward", 2.0, peak=GIB),
        ("nope", "textbook"): Entry("nope", 512, 1, "forward", 8.0, peak=4 * GIB),
        ("kerple", "fused"): Entry("kerple", 512, 1, "forward", 5.0, peak=2 * GIB),
        ("kerple", "textbook"): Entry(
            "kerple", 512, 1, "forward", missing=Missing("out of memory", "24 GiB")
        ),
    }
    costs = [model.Cost("tiny", form, GIB, entry) for (_, form), entry in entries.items()]
    (table,) = tables(model.Costs(1, 0, {}, costs))
    assert table.rows == [
        ["nope, fused", "2.00 (1.00)", "2.00"],
        ["nope, textbook", "8.00 (4.00)", "5.00"],
        ["kerple, fused", "5.00 (2.50)", "3.00"],
        ["kerple, textbook", "OOM", "—"],
    ]


def test_eager_times_have_a_table_of_their_own():
    """A time between CUDA events is eager already."""
    graph = {"clock": clock.GRAPHED, "peak": GIB}
    entries = {
        "nope": Entry("nope", 512, 1, "forward", 2.0, eager=10.0, launches=200, **graph),
        "kerple": Entry("kerple", 512, 1, "forward", 3.0, eager=15.0, launches=250, **graph),
        "fire": Entry("fire", 512, 1, "forward", 80.0, clock=clock.EVENTS, peak=GIB),
        "t5": Entry("t5", 512, 1, "forward", 19.0, eager=20.0, launches=20, **graph),
        "cope": Entry("cope", 512, 1, "forward", missing=Missing("out of memory", "24 GiB")),
    }
    costs = [model.Cost("tiny", "fused", GIB, entry) for entry in entries.values()]
    timed, eager = tables(model.Costs(1, 0, {}, costs))
    assert [timed.title, eager.title] == ["tiny, forward", "tiny, forward, eager"]
    assert timed.rows[1] == ["kerple, fused", "3.00 (1.50)", "2.00"]
    assert eager.header == ["scheme", "512 (ms)"]
    assert eager.rows == [
        ["nope, fused", "10.0 (1.00)"],
        ["kerple, fused", "15.0 (1.50)"],
        ["fire, fused", "80.0 (8.00)"],
        ["t5, fused", "20.0 (2.00)"],
        ["cope, fused", "OOM"],
    ]
    assert timed.note == "In brackets: the ratio to nope, fused."
    host = "The host took 50.0 to 60.0 microseconds a launch: two rows less than 1.20 times apart"
    assert eager.note == f"{timed.note} {host} may differ by the host alone."


def test_a_time_that_another_program_may_have_disturbed_is_named():
    """As on an H200, where tests ran beside the first row."""
    runs = {
        "nope": (82.561, 69.522, 83.542),
        "rope": (70.132, 69.4, 73.1),
        "t5": (11.0, 10.0, 11.1),
    }
    entries = [Entry(name, 1024, 1, "forward", *times, 14) for name, times in runs.items()]
    costs = [model.Cost("tiny", "fused", GIB, entry) for entry in entries]
    (table,) = tables(model.Costs(1, 0, {}, costs))
    assert table.note == (
        "In brackets: the ratio to nope, fused. Unsteady, the median is more than 10 % above the "
        "fastest run, as beside a second program: nope, fused, 1,024 (69.5 to 83.5 ms)."
    )


def test_a_length_at_which_a_scheme_was_not_measured_is_left_empty():
    graph = {"clock": clock.GRAPHED, "peak": GIB}
    entries = [
        Entry("nope", 512, 1, "forward", 2.0, eager=10.0, **graph),
        Entry("nope", 1024, 1, "forward", 4.0, eager=10.0, **graph),
        Entry("kerple", 512, 1, "forward", 3.0, eager=15.0, **graph),
    ]
    costs = [model.Cost("tiny", "fused", GIB, entry) for entry in entries]
    timed, eager = tables(model.Costs(1, 0, {}, costs))
    assert timed.header == ["scheme", "512 (ms)", "1,024 (ms)", "512 (GiB)", "1,024 (GiB)"]
    assert timed.rows[1] == ["kerple, fused", "3.00 (1.50)", "—", "2.00", "—"]
    assert eager.rows[1] == ["kerple, fused", "15.0 (1.50)", "—"]
    timed, _ = tables(model.Costs(1, 0, {}, costs[2:]))
    assert timed.rows == [["kerple, fused", "3.00", "2.00"]], "no ratio without a divisor"
    lost = Entry("nope", 512, 1, "forward", missing=Missing("out of memory", "24 GiB"))
    timed, _ = tables(model.Costs(1, 0, {}, [model.Cost("tiny", "fused", GIB, lost), costs[2]]))
    assert timed.rows == [["nope, fused", "OOM", "—"], ["kerple, fused", "3.00", "2.00"]]


def test_costs_of_a_gpu_are_read_again(tmp_path, monkeypatch):
    """PyTorch gives the version of cuDNN as a number, as earlier records keep it."""
    monkeypatch.setattr("dape.provenance.device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    made = origin(torch.device("cuda"), ["bench", "model"])
    assert made["versions"]["cuda"] == "13.0"
    assert made["versions"]["cudnn"] == "91900"
    path = tmp_path / "results.json"
    for provenance in (made, made | {"versions": {"cuda": "13.0", "cudnn": 91900}}):
        model.Costs(1, 0, provenance).save(path)
        assert model.load(path).provenance == provenance


def test_a_version_that_is_missing_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("dape.provenance.device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    made = origin(torch.device("cuda"), ["bench", "model"])
    assert not {"cuda", "cudnn"} & set(made["versions"])
    path = tmp_path / "results.json"
    model.Costs(1, 0, made).save(path)
    assert model.load(path).provenance == made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sizes", "126m"), "unknown size '126m'; did you mean '125m'?"),
        (("--forms", "fast"), "unknown form 'fast'"),
        (("--schemes", "keple"), "unknown scheme 'keple'"),
        (("--batch", "0"), "--batch 0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert cli.main(["bench", "model", *TINY, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
