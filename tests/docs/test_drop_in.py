"""The code and the diffs of docs/drop-in.md, against float64 formulas and between their forms."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pages import BLOCK, ROOT, blocks, execute, text
from torch.testing import assert_close

import dape

AutoregressiveWrapper = pytest.importorskip("x_transformers").AutoregressiveWrapper
PAGE = "docs/drop-in.md"
FLASH = blocks(PAGE, "python")[0]
close = {"rtol": 0, "atol": 1e-5}


def attention(query, key, value, bias, adapter, offset):
    """Return attention over `[batch, heads, length, head_dim]` by its formula in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    rows, keys = query.shape[2], key.shape[2]
    i, j = torch.arange(rows) + offset, torch.arange(keys)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.mT / query.shape[3] ** 0.5
    distance = (i[:, None] - j).abs()[None].double()
    p, a = (x.double()[:, None, None] for x in (bias.p, bias.a))
    both = torch.cat((logits, (-p * torch.log1p(a * distance)).expand_as(logits)), dim=1)
    first = torch.einsum("oc,bcqk->boqk", adapter.weight_in[..., 0].double(), both)
    hidden = first + adapter.bias_in.double()[:, None, None]
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    second = torch.einsum("oc,bcqk->boqk", adapter.weight_out[..., 0].double(), hidden)
    logits = both[:, : query.shape[1]] + both[:, query.shape[1] :] + second
    logits = logits + adapter.bias_out.double()[:, None, None]
    visible = j <= i[:, None]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.where(visible.any(-1)[:, None], weights, 0) @ value


def patched(name, number):
    """Return the names of a stand-in after the diff of the page."""
    lines = (ROOT / f"tests/docs/standins/{name}.txt").read_text().splitlines()
    diff, place = blocks(PAGE, "diff")[number], 0
    for line in diff.splitlines():
        kind, rest = line[0], line[1:]
        if kind == "@":
            owner, method = line.removeprefix("@@ ").split(".")
            place = next(n for n, each in enumerate(lines) if each.startswith(f"class {owner}("))
            place = next(n for n in range(place, len(lines)) if f"def {method}(" in lines[n]) + 1
        elif kind == "+":
            lines.insert(place, rest)
            place += 1
        else:
            place = lines.index(rest, place)
            lines[place : place + 1] = [] if kind == "-" else [rest]
            place += kind == " "
    names = {}
    exec("\n".join(lines), names)
    return names


@pytest.fixture(scope="module")
def flash():
    names = {}
    exec(FLASH, names)
    return names


@pytest.mark.parametrize("rows, keys", [(7, 7), (3, 7), (1, 7), (7, 4)])
def test_the_causal_mask_is_aligned_bottom_right(flash, rows, keys):
    query = torch.randn(2, rows, 4, 8)
    key, value = torch.randn(2, 2, keys, 2, 8)
    bias, adapter = dape.Kerple(4), dape.DAPE(4)
    found = flash["flash_attn_func"](query, key, value, bias, adapter, causal=True)
    turned = (x.transpose(1, 2) for x in (query, key, value))
    expected = attention(*turned, bias, adapter, offset=keys - rows).transpose(1, 2)
    assert_close(found.double(), expected, **close)
    if rows > keys:
        assert not found[:, : rows - keys].any()


def test_the_table_of_offsets_is_that_of_pytorch():
    query, key, value = torch.randn(1, 2, 3, 8), *torch.randn(2, 1, 2, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(dape.attention(query, key, value, query_offset=0), expected, **close)
    assert "| `0` |" in text(PAGE) and "| `Tk - Tq` |" in text(PAGE)


def test_flash_attn_alibi_is_the_bias(flash):
    """The formula of flash-attn: -slope |i + Tk - Tq - j|, bottom-right like its mask."""
    query, key, value = torch.randn(1, 3, 2, 8), *torch.randn(2, 1, 5, 2, 8)
    found = flash["flash_attn_func"](query, key, value, dape.ALiBi(2), causal=True)
    i, j = torch.arange(3)[:, None] + 2, torch.arange(5)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key).double() / 8**0.5
    logits = logits - torch.tensor([1 / 16, 1 / 256])[:, None, None] * (i - j).abs()
    weights = logits.masked_fill(j > i, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value.double())
    assert_close(found.double(), expected, **close)


CONFIG = SimpleNamespace(
    vocab_size=11, n_embd=32, n_head=4, n_kv_head=2, n_layer=2, dropout=0.0, block_size=8
)


def test_nanogpt_attends_by_the_formula_and_past_its_block_size():
    model = patched("nanogpt", 0)["GPT"](CONFIG).eval()
    layer, x = model.transformer.h[0], torch.randn(2, 20, 32)
    parts = layer.c_attn(x).split(32, dim=2)
    heads = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in parts)
    out = attention(*heads, layer.position_bias, layer.adapter, offset=0)
    expected = layer.c_proj(out.transpose(1, 2).flatten(2).float())
    assert_close(layer(x), expected, **close)
    ids = torch.randint(11, (1, 20))
    assert_close(model(ids)[:, :13], model(ids[:, :13]), **close)
    model(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_nanochat_attends_by_the_formula_and_reads_its_cache(flash, monkeypatch):
    module = ModuleType("dape_flash")
    vars(module).update(flash)
    monkeypatch.setitem(sys.modules, "dape_flash", module)
    with torch.device("meta"):
        model = patched("nanochat", 1)["GPT"](CONFIG)
    model.to_empty(device="cpu").init_weights()
    layer, x = model.transformer.h[1].attn, torch.randn(2, 20, 32)
    projections = (layer.c_q, layer.c_k, layer.c_v)
    q, k, v = (f(x).unflatten(2, (-1, 8)).transpose(1, 2) for f in projections)
    q, k = (y / y.square().mean(-1, keepdim=True).sqrt() for y in (q, k))
    out = attention(q, k, v, layer.position_bias, layer.adapter, offset=0)
    expected = layer.c_proj(out.transpose(1, 2).flatten(2).float())
    assert_close(layer(x, (None, None), (-1, 0), None), expected, **close)

    ids, cache = torch.randint(11, (2, 20)), Cache()
    whole = model(ids)
    pieces = [model(ids[:, start:stop], cache) for start, stop in ((0, 12), (12, 13), (13, 20))]
    assert_close(torch.cat(pieces, dim=1), whole, **close)


class Cache:
    """A cache with the names and shapes of nanochat's."""

    n_layers = 2

    def __init__(self):
        self.layers = torch.zeros(2, 2, 2, 24, 2, 8)
        self.cache_seqlens = torch.zeros(2, dtype=torch.int32)

    def get_layer_cache(self, index):
        return self.layers[index]

    def advance(self, tokens):
        self.cache_seqlens += tokens


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("drop-in"))
        return execute(PAGE)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_x_transformers_attends_by_the_formula(names, kv_heads):
    attend = names["Attend"](heads=4)
    query, key, value = torch.randn(2, 4, 3, 8), *torch.randn(2, 2, kv_heads, 5, 8)
    found, _ = attend(query, key, value)
    heads = [n % kv_heads for n in range(4)]  # x-transformers: head h takes key head h mod groups
    given = (query, key[:, heads], value[:, heads], attend.position_bias, attend.adapter)
    assert_close(found.double(), attention(*given, offset=2), **close)


@torch.no_grad()
def test_without_dape_the_attend_is_that_of_x_transformers(names):
    from x_transformers import attend as theirs

    attend, zeros = names["Attend"](heads=4), torch.nn.init.zeros_
    for parameter in attend.parameters():
        zeros(parameter)
    attend.position_bias.raw_p.fill_(-100)  # softplus: B = 0
    original = theirs.Attend(causal=True, heads=4)
    query, key, value = torch.randn(2, 4, 3, 8), *torch.randn(2, 2, 2, 5, 8)
    mask = torch.rand(2, 1, 1, 5) > 0.3
    mask[..., 0] = True
    for given in ({}, {"mask": mask}):
        expected, _ = original(query, key, value, **given)
        assert_close(attend(query, key, value, **given)[0], expected, **close)


@torch.no_grad()
def test_x_transformers_generates_with_its_cache_as_without(names):
    model = AutoregressiveWrapper(names["model"]).eval()
    assert sum(isinstance(each, names["Attend"]) for each in model.modules()) == 2
    prompt = torch.randint(257, (1, 9))
    found, expected = (
        model.generate(prompt, 12, temperature=0.0, cache_kv=cached) for cached in (True, False)
    )
    assert torch.equal(found, expected)


def test_trainer_learns_and_the_saved_model_reads_further(names):
    assert names["trainer"].state.global_step == 60
    assert names["long"] < 2  # a uniform guess is 5.5
    trained, loaded = names["trainer"].model.eval(), names["loaded"]
    ids = names["text"][None, :64]
    assert torch.equal(trained(ids).logits, loaded(ids).logits)


def test_every_block_of_the_page_is_run():
    assert [name for name, _ in BLOCK.findall(text(PAGE))] == [
        *("python", "diff", "diff", "python", "python"),
    ]
