"""Positions, biases, adapters and their parameters are float32, however a model comes about."""

import pytest
import torch
from torch.testing import assert_close

import dape
from dape.positions.adapter import Rows

MODULES = {
    "alibi": lambda: dape.ALiBi(12),
    "kerple": lambda: dape.Kerple(12),
    "kerple-power": lambda: dape.KerplePower(12),
    "t5": lambda: dape.T5(12),
    "sandwich": lambda: dape.Sandwich(12),
    "fire": lambda: dape.FIRE(12),
    "nope": lambda: dape.NoBias(12),
    "learned": lambda: dape.Learned(128, 32),
    "dape": lambda: dape.DAPE(12),
    "dape3": lambda: dape.DAPE(12, kernel_size=3),
    "talking heads": lambda: dape.TalkingHeads(12),
    "cope": lambda: dape.CoPE(64),
    "transformer-xl": lambda: dape.TransformerXL(12, 64, 128),
}
BIASES = ("alibi", "kerple", "kerple-power", "t5", "sandwich", "fire", "nope")
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(params=NARROW, ids=str)
def narrow(request):
    return request.param


@pytest.fixture
def around(narrow):
    """Let everything be built in 16 bits unless it says otherwise."""
    torch.set_default_dtype(narrow)
    yield
    torch.set_default_dtype(torch.float32)


def built(name):
    torch.manual_seed(0)
    return MODULES[name]()


def loaded(module, narrow):
    """Load numbers of 16 bits in the place of the parameters, of a module within a model."""
    model = torch.nn.Sequential(module)
    model.load_state_dict({k: v.to(narrow) for k, v in model.state_dict().items()}, assign=True)
    return module


CASTS = {
    "to": lambda module, narrow: module.to(narrow),
    "type": lambda module, narrow: module.type(narrow),
    "half": lambda module, narrow: module.half(),
    "bfloat16": lambda module, narrow: module.bfloat16(),
    "within a model": lambda module, narrow: torch.nn.Sequential(module).to("cpu", narrow)[0],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", MODULES)
def test_a_cast_changes_no_parameter(name, cast, narrow):
    module, before = built(name), built(name).state_dict()
    assert_close(CASTS[cast](module, narrow).state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_numbers_of_16_bits_are_widened_when_loaded(name, narrow):
    module = loaded(built(name), narrow)
    assert all(x.dtype == torch.float32 for x in module.parameters())
    rounded = {k: v.to(narrow).float() for k, v in built(name).state_dict().items()}
    assert_close(module.state_dict(), rounded, rtol=0, atol=0)


def test_other_moves_are_as_ever():
    module = dape.Kerple(12)
    assert module.double().raw_p.dtype == torch.float64
    assert module.to("meta").raw_p.is_meta
    assert module.raw_p.dtype == torch.float64
    assert dape.Kerple(12).to_empty(device="cpu").raw_p.dtype == torch.float32
    counting = dape.Kerple(12)
    counting.register_buffer("steps", torch.tensor(2**24 + 1))
    assert torch.equal(counting.half().steps, torch.tensor(2**24 + 1))


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("name", MODULES)
def test_a_default_of_16_bits_is_not_taken(name):
    assert all(x.dtype == torch.float32 for x in built(name).parameters())


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_built_in_16_bits_is_the_same_far_away(name, narrow):
    query, key = torch.tensor([16383, 524288]), torch.tensor([0, 1, 257])
    expected = built(name)(query, key)
    torch.set_default_dtype(narrow)
    try:
        found = built(name)(query, key)
    finally:
        torch.set_default_dtype(torch.float32)
    if name == "alibi":
        slopes = 2.0 ** -torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])
        distance = query[:, None] - key
        assert_close(expected, -slopes[:, None, None] * distance, rtol=1e-6, atol=0)
    assert_close(found, expected, rtol=0, atol=0)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["alibi", "dape-kerple", "dape3-kerple", "cope", "sandwich"])
def test_a_model_of_16_bits_has_the_encoding_of_one_in_float32(scheme, narrow, tmp_path):
    config = dape.DapeConfig(
        scheme=scheme, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=40
    )
    model = dape.DapeForCausalLM(config)
    exact = {
        name: x.clone()
        for name, x in model.state_dict().items()
        if "position_bias" in name or "adapter" in name
    }
    model.save_pretrained(tmp_path)
    read = dape.DapeForCausalLM.from_pretrained(tmp_path, dtype=narrow)
    for other in (model.to(narrow), read):
        assert other.lm_head.weight.dtype == narrow
        found = {name: x for name, x in other.state_dict().items() if name in exact}
        assert_close(found, exact, rtol=0, atol=0)


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_attention_itself_asks_for_no_default(backend):
    query, key, value = torch.randn(3, 1, 4, 20, 8, dtype=torch.float32)
    parts = dape.ALiBi(4), dape.DAPE(4)
    found = dape.attention(query, key, value, *parts, backend=backend)
    torch.set_default_dtype(torch.float32)
    expected = dape.attention(query, key, value, *parts, backend="reference")
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


ROTATIONS = {"rope": lambda: dape.RoPE(8), "dynamic-ntk": lambda: dape.DynamicNTK(8, 16)}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("name", [*BIASES, *ROTATIONS])
def test_positions_of_few_bits_do_not_overflow(name, dtype):
    most, query = torch.iinfo(dtype).max, torch.randn(1, 1, 5, 8)
    positions = torch.tensor([-most, 0, 1, most - 1, most], dtype=dtype)

    def result(positions):
        if name in ROTATIONS:
            return ROTATIONS[name]()(query, query, positions)
        return built(name)(positions, positions)

    assert_close(result(positions), result(positions.long()), rtol=0, atol=0)


def rows():
    places = torch.arange(5)
    visible = (places <= places[:, None])[None, None]
    query, key = torch.randn(1, 12, 5, 64), torch.randn(1, 12, 5, 64)
    return Rows(query, key, places, places, visible, 0.125)


def given(name, module):
    """Return arguments of a module: positions, or scores and a bias."""
    if name in BIASES:
        return torch.arange(5), torch.arange(5)
    scores = torch.randn(1, 12, 5, 5), torch.randn(12, 5, 5)
    return (*scores, rows()) if getattr(module, "needs_rows", False) else scores


ALONE = pytest.mark.parametrize("name", sorted({*MODULES} - {"learned"}))


@ALONE
def test_without_memory_a_module_has_the_shape_of_its_output(name):
    expected = built(name)(*given(name, built(name))).shape
    with torch.device("meta"):
        module = built(name)
        assert module(*given(name, module)).shape == expected


@ALONE
def test_autocast_rounds_no_module_that_is_called_alone(name):
    module = built(name)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    arguments = given(name, module)
    expected = module.double()(
        *(x.double() if x.is_floating_point() else x for x in arguments[:2]), *arguments[2:]
    )
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(*arguments)
    assert found.dtype == torch.float32
    assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)
