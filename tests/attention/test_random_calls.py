"""`benchmarks/random_calls.py` on a CPU: a few calls, and it sees what is wrong."""

from types import SimpleNamespace

import pytest

import dape


def test_ten_calls_are_right(random_calls, capsys):
    assert random_calls.main(["--device", "cpu", "--workers", "0", "--no-long"]) == 0
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    assert last_lines[0].split()[:2] == ["all", "10"]
    assert last_lines[1].startswith("seed 0, 10 calls")


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_so_are_those_of_the_kernels(random_calls):
    given = ["--device", "cpu", "--workers", "0", "--no-long", "--backends", "triton"]
    assert random_calls.main([*given, "--calls", "8", "--shapes", "8", "--seed", "3"]) == 0


def test_long_calls_are_reported_one_by_one(random_calls, benchmarks, monkeypatch, capsys):
    drawn = benchmarks("drawn_calls")
    shape = drawn.Shape(2, 1, 8, 8, 4, "bf16", "concat", False, True, False)
    calls = [drawn.Call(shape, "auto", name, 1, 6, 40, 34) for name in ("kerple", "alibi")]
    monkeypatch.setattr(random_calls, "long_calls", lambda: iter(calls))
    assert random_calls.main(["--calls", "0", "--device", "cpu", "--workers", "0", "--long"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:21] for line in lines if line.startswith("long")] == [
        "long 1 of 2: 1 calls,", "long 2 of 2: 1 calls,",
    ]  # fmt: skip
    assert lines[-1].startswith("seed 0, 2 calls")


WRONG = {
    "off": lambda out: out * 1.05,
    "not finite": lambda out: out * float("nan"),
    "crashed": lambda out: out @ out,
}


@pytest.mark.parametrize("outcome", WRONG)
def test_wrong_calls_are_counted(random_calls, benchmarks, monkeypatch, capsys, outcome):
    def attention(*given, **options):
        return WRONG[outcome](dape.attention(*given, **options))

    names = {name: getattr(dape, name) for name in dape.__all__}
    package = SimpleNamespace(**names | {"attention": attention})
    monkeypatch.setattr(benchmarks("judged_calls"), "dape", package)
    assert (
        random_calls.main(["--device", "cpu", "--workers", "0", "--no-long", "--calls", "4"]) == 1
    )
    assert f"{outcome}: " in capsys.readouterr().out
