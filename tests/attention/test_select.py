"""Which backend serves a call, and what the others say."""

from types import SimpleNamespace

import pytest
import torch
from problems import Problem
from torch.testing import assert_close

import dape
from dape.attention import select
from dape.attention.call import Call
from dape.errors import UserError


@pytest.fixture(autouse=True)
def every_machine_is_asked():
    select.missing.cache_clear()
    yield
    select.missing.cache_clear()


@pytest.mark.parametrize(
    ("device", "missing", "hindered", "wanted", "expected"),
    [
        ("cpu", "", "", None, "sdpa"),
        ("cpu", "", "sdpa", None, "chunked"),  # the interpreter is for tests
        ("cpu", "", "", "lse", "chunked"),
        ("cpu", "", "", "weights", "reference"),
        ("cuda", "", "", None, "sdpa"),
        ("cuda", "", "", "lse", "cuda"),
        ("cuda", "", "", "weights", "reference"),
        ("cuda", "", "sdpa", None, "cuda"),
        ("cuda", "", "sdpa cuda", None, "triton"),
        ("cuda", "", "sdpa cuda triton", None, "chunked"),
        ("cuda", "cuda", "sdpa", None, "triton"),
        ("cuda", "cuda triton", "sdpa", None, "chunked"),
    ],
)
def test_the_fastest_without_an_obstacle_is_taken(
    monkeypatch, device, missing, hindered, wanted, expected
):
    asked, modules = [], {}

    def module(name):
        def obstacle(call):
            asked.append(name)
            return "this call" if name in hindered.split() else None

        return SimpleNamespace(obstacle=obstacle, attend=obstacle)

    for name, backend in select.BACKENDS.items():
        modules[name] = module(name)
        monkeypatch.setitem(select.BACKENDS, name, backend._replace(module=modules[name]))
    monkeypatch.setattr(select, "absent", lambda name: "no" if name in missing.split() else None)
    tensor = SimpleNamespace(device=torch.device(device))
    assert select.select(Call(tensor, tensor, tensor), "auto", wanted) is modules[expected]
    assert not set(asked) & set(missing.split())  # what is not here is not asked, nor imported


def pretend(monkeypatch, capability=None, built=True, triton=True):
    """Let the machine have a GPU of some compute capability or none, and CUDA and Triton or not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if built else None)
    monkeypatch.setattr(select, "has_triton", lambda: triton)


@pytest.mark.parametrize(
    ("machine", "reasons"),
    [
        ({}, {"triton": "no CUDA GPU", "cuda": "no CUDA GPU"}),
        (
            {"built": False},
            dict.fromkeys(("triton", "cuda"), "this PyTorch is built without CUDA"),
        ),
        ({"triton": False}, {"triton": "triton is not installed", "cuda": "no CUDA GPU"}),
        (
            {"capability": (7, 5)},
            {"triton": None, "cuda": "the GPU is older than compute capability 8.0"},
        ),
        (
            {"capability": (9, 0), "triton": False},
            {"triton": "triton is not installed", "cuda": "triton is not installed"},
        ),
        ({"capability": (8, 0)}, {"triton": None, "cuda": None}),
    ],
)
def test_what_does_not_work_here_says_why_in_a_line(monkeypatch, machine, reasons):
    pretend(monkeypatch, **machine)
    for name, reason in reasons.items():
        if reason is None:
            select.check_backend(name)
            continue
        with pytest.raises(UserError) as refused:
            select.check_backend(name)
        assert str(refused.value) == f"backend={name!r} does not work here: {reason}; use 'auto'"


def test_weights_and_lse_are_not_returned_together():
    query, key, value = Problem().tensors()
    with pytest.raises(
        UserError, match=r"^return_weights=True and return_lse=True: .*make two calls$"
    ):
        dape.attention(query, key, value, return_weights=True, return_lse=True)


class Doubling(torch.nn.Module):
    """An adapter that no kernel knows."""

    def forward(self, scores, bias):
        return 2 * scores + bias


class Slope(dape.NoBias):
    """A bias that depends on the query's position."""

    relative = False

    def forward(self, query_positions, key_positions):
        rows = query_positions[..., :, None] * key_positions[..., None, :] / 50
        return rows[..., None, :, :].expand(*rows.shape[:-2], 4, -1, -1).float()


SEEN = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
CALLS = {  # sizes and options, and which backend a GPU would take
    "nothing added": ({}, {}, "sdpa"),
    "offset": ({}, {"query_offset": 2}, "triton"),
    "rows without keys": ({}, {"query_offset": -3}, "triton"),
    "padding": ({}, {"mask": SEEN[:, 0, 6]}, "triton"),
    "log-sum-exp": ({}, {"return_lse": True}, "triton"),
    "wider values": ({"value_dim": 6}, {}, "triton"),
    "static bias": ({}, {"bias": dape.Kerple(4)}, "triton"),
    "dape": ({}, {"bias": dape.Kerple(4), "adapter": dape.DAPE(4)}, "triton"),
    "mask of every query": ({}, {"mask": SEEN}, "chunked"),
    "offset in a tensor": ({}, {"query_offset": torch.tensor(2)}, "chunked"),
    "positions": ({}, {"bias": dape.ALiBi(4), "key_positions": torch.arange(7) * 2}, "chunked"),
    "positions of queries": (
        {},
        {"bias": dape.ALiBi(4), "query_positions": torch.arange(7) * 2},
        "chunked",
    ),
    "a bias over rows": ({}, {"bias": Slope(4)}, "chunked"),
    "a user's adapter": ({}, {"adapter": Doubling()}, "chunked"),
    "dape v2": ({}, {"bias": dape.Kerple(4), "adapter": dape.DAPE(4, 5, 3)}, "triton"),
    "dape v2 behind fire": ({}, {"bias": dape.FIRE(4), "adapter": dape.DAPE(4, 5, 3)}, "chunked"),
    "dape v2, wide": ({}, {"adapter": dape.DAPE(4, 33, 3)}, "chunked"),
    "talking heads": ({}, {"bias": dape.Kerple(4), "adapter": dape.TalkingHeads(4)}, "triton"),
    "many hidden units": ({}, {"bias": dape.Kerple(4), "adapter": dape.DAPE(4, 65)}, "chunked"),
    "many heads": ({"heads": 33, "kv_heads": 33}, {"bias": dape.ALiBi(33)}, "chunked"),
    "a large batch": (
        {"batch": 65536, "heads": 1, "kv_heads": 1, "rows": 1, "keys": 2},
        {"bias": dape.ALiBi(1)},
        "chunked",
    ),
    "wide heads": ({"head_dim": 129}, {"bias": dape.ALiBi(4)}, "chunked"),
    "float64": ({"dtype": torch.float64}, {"bias": dape.ALiBi(4)}, "chunked"),
    "values of another dtype": ({"value_dtype": torch.float16}, {}, "chunked"),
}


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("name", CALLS)
def test_auto_serves_whatever_chunked_serves(monkeypatch, name):
    sizes, options, expected = CALLS[name]
    sizes, taken = dict(sizes), []
    dtype = sizes.pop("dtype", torch.float32)
    value_dtype = sizes.pop("value_dtype", dtype)
    query, key, value = Problem(**sizes).tensors(dtype)
    value = value.to(value_dtype)

    def as_on_a_gpu(device):
        return [name for name in select.BACKENDS if select.absent(name) is None]

    def noted(name, attend):
        def attended(call, lse=False):
            taken.append(name)
            return attend(call, lse)

        return attended

    if not torch.cuda.is_available():
        monkeypatch.setattr(select, "order", as_on_a_gpu)
        for backend, (module, *_) in select.BACKENDS.items():
            monkeypatch.setattr(module, "attend", noted(backend, module.attend))
    found = dape.attention(query, key, value, **options)
    assert taken[:1] in ([expected], [])
    truth = dape.attention(query, key, value, **options, backend="chunked")
    assert_close(found, truth, rtol=1e-4, atol=1e-4)


def test_the_interpreter_is_not_given_what_it_computes_wrongly():
    given, bias = torch.randn(3, 1, 4, 40, 16).bfloat16(), dape.Kerple(4)
    with pytest.raises(UserError, match="Triton's interpreter multiplies no bfloat16"):
        dape.attention(*given, bias, dape.DAPE(4), backend="triton")
    found, exact = (dape.attention(*x, bias) for x in (given, given.double()))
    assert (found - exact).norm() < 0.01 * exact.norm()
