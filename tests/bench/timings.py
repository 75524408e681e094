"""Results as a benchmark leaves them, made by hand."""

from dape.bench.record import Check, Entry, Missing, Results

PROVENANCE = {
    "command": "dape bench attention", "commit": "c0ffee", "versions": {"torch": "2.0"},
    "device": "abacus", "time": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
NO_BIAS = Missing("not served", "it knows no bias")
FULL = Missing("out of memory", "OutOfMemoryError: 24 GiB")


def entries(method, length, forward, training, peak=None):
    """Both directions; milliseconds, or why there are none."""
    for direction, found in (("forward", forward), ("forward + backward", training)):
        place = (method, length, 16384 // length, direction)
        if isinstance(found, Missing):
            yield Entry(*place, missing=found)
        else:
            yield Entry(*place, found, found / 2, 2 * found, 5, 4, "CUDA graph", peak)


def results():
    """Two lengths of four methods, of which one is not served and one grows out of memory."""
    made = Results(
        scheme="dape-kerple", shape="125m", heads=12, head_dim=64, dtype="bf16", tokens=16384,
        seed=5, provenance=PROVENANCE, yardstick="CUDNN_ATTENTION",
    )  # fmt: skip
    for length in (512, 2048):
        made.checks.extend(
            Check(method, length, "forward", 1, length // 2, {"output": 1e-3}, {"output": 2e-3})
            for method in ("sdpa", "cuda", "textbook")
        )
        made.entries.extend(entries("sdpa", length, 0.05, 0.25, peak=3 * 2**20))
        made.entries.extend(entries("flex", length, NO_BIAS, NO_BIAS))
        made.entries.extend(entries("cuda", length, 0.2, 1234.5, peak=2**30))
        made.entries.extend(entries("textbook", length, 6.0, FULL if length > 512 else 14.0))
    return made
