import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small import losses, metrics, recipe, validation_loss
from spread import CALLS, arguments
from two_ranks import HALFWAY, MEASURING, RESUMED, ROPE, table

from dape import DapeConfig, DapeForCausalLM, attention
from dape.attention.context_parallel import ContextParallel
from dape.data.shards import Corpus
from dape.errors import UserError
from dape.evaluate import evaluate
from dape.evaluate.record import load
from dape.runs import RunFolder
from dape.train import parallelize
from dape.train.plan import check
from dape.train.run import train
from dape.train.sections import Hardware


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """Return a folder with the same run on one rank, and on two: sharded, fused, and copied."""
    out = tmp_path_factory.mktemp("ranks")
    train(recipe(data, out / "one", **HALFWAY))
    train(recipe(data, out / "one-rope", **ROPE))
    halves = {"micro_batch_size": 4}
    train(recipe(data, out / "one-bf16", hardware=halves, training={"precision": "bf16-mixed"}))
    script = Path(__file__).with_name("two_ranks.py")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, data, out],
        capture_output=True,
        text=True,
        env=os.environ | paths | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "lightning" not in done.stderr, "no warning"
    return out


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp",
        "fused",
        "ddp",
        "fsdp-step",
        "fsdp-pass",
        "fsdp-rope",
        "spread",
        "spread-rope",
        *RESUMED,
    ],
)
def test_two_ranks_train_as_one(out, layout):
    one = "one-rope" if layout.endswith("rope") else "one"
    assert losses(out / layout) == pytest.approx(losses(out / one), rel=1e-5)
    norms = [[entry["grad_norm"] for entry in metrics(out / name)] for name in (layout, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    validations = [metrics(out / name)[-1]["validation_loss"] for name in (layout, one)]
    assert validations[0] == pytest.approx(validations[1], rel=1e-5)


def test_weights_that_travel_in_bfloat16_learn_what_autocast_learns(out):
    """They are rounded to it before they are used, and so are the gradients of each half batch.

    Processors round products in bfloat16 in different ways, and updates carry the differences on.
    """
    runs = ("fsdp-bf16", "one-bf16", "one")
    found, expected, without = (np.array(losses(out / run)) for run in runs)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[0] != pytest.approx(without[0], rel=1e-5)
    assert abs(found - expected).max() < abs(without - expected).max() / 2


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_the_exported_model_is_whole(out, data, layout):
    model = DapeForCausalLM.from_pretrained(out / layout / "model").eval()
    logged = metrics(out / layout)[-1]["validation_loss"]
    assert validation_loss(model, Corpus(data), batches=8) == pytest.approx(logged, rel=1e-6)


def test_a_matrix_of_embedding_and_head_is_saved_once(out):
    """A file of shards gathered by name had the matrix twice."""
    found, expected = (
        load_file(out / layout / "model/model.safetensors") for layout in ("fsdp-rope", "one-rope")
    )
    assert found.keys() == expected.keys() and "lm_head.weight" not in found
    entries = "model.embed_tokens.weight"
    assert found[entries] == pytest.approx(expected[entries], abs=1e-5)


def test_each_rank_holds_its_part_of_each_parameter(out):
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    weights = load_file(out / "one/model/model.safetensors")
    assert first.keys() == second.keys() == weights.keys()
    for name, (is_sharded, placements, size, own) in first.items():
        assert is_sharded and placements == "(Shard(dim=0),)"
        assert size == weights[name].size == own + second[name][3]
        rows = weights[name].shape[0]
        assert own == size // rows * ((rows + 1) // 2), "the first half of the rows"


def test_each_rank_saves_its_shards(out):
    saved = RunFolder(out / "fsdp").latest_checkpoint
    assert {path.name for path in saved.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


def test_a_checkpoint_that_one_rank_cannot_read_is_passed_over_by_all(out):
    """Each rank would go on from a step of its own."""
    steps = [int(path.name[-8:]) for path in RunFolder(out / "ddp").saved_checkpoints()]
    assert steps == [6, 3]
    assert [json.loads((out / f"resumed-{rank}.json").read_text()) for rank in (0, 1)] == [3, 3]


@pytest.mark.parametrize("layout", ["fsdp", "spread"])
def test_a_run_of_two_ranks_goes_on_with_one(out, data, layout):
    """Their checkpoint, loaded by one, exports the same model."""
    record = RunFolder(out / layout)
    before = (record.model / "model.safetensors").read_bytes()
    (record.model / "model.safetensors").unlink()
    record.update_record({"ended": None})
    train(recipe(data, out / layout))
    assert (record.model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", CALLS)
def test_attention_over_two_ranks_is_that_of_one(out, name):
    """Outputs and gradients, in float64, of the kernels in float32."""
    whole, bias, adapter, _ = arguments(name)
    whole = [x.double() for x in whole]
    modules = [module.double() for module in (bias, adapter) if module]
    inputs = [x.requires_grad_() for x in whole[:3]]
    result = attention(*inputs, bias, adapter, backend="reference")
    learned = [p for module in modules for p in module.parameters()]
    expected = [result, *torch.autograd.grad((result * whole[3]).sum(), inputs + learned)]
    ranks = [torch.load(out / f"attention-{rank}.pt")[name] for rank in (0, 1)]
    tolerance = 1e-10 if ranks[0][0].dtype == torch.float64 else 2e-5
    for number, (right, *found) in enumerate(zip(expected, *ranks, strict=True)):
        if number < 4:
            parts = [ContextParallel("", rank, 2).part(right, dim=2) for rank in (0, 1)]
            for part, each in zip(parts, found, strict=True):
                assert torch.allclose(each.double(), part, rtol=tolerance, atol=tolerance)
        else:
            summed = sum(found).double()
            assert torch.allclose(summed, right, rtol=10 * tolerance, atol=10 * tolerance)


def test_windows_over_two_ranks_have_the_perplexity_of_one(out):
    """At lengths that four chunks do not share evenly, too; the first rank keeps the file."""
    (expected,) = evaluate(out / "ddp", **MEASURING, out=out / "evaluation")
    (file,) = (out / "spread-evaluation").rglob("non_overlapping.json")
    found = load(file)
    for length in MEASURING["lengths"]:
        one, two = (each.by_length[length] for each in (expected, found))
        assert two.windows == one.windows
        assert two.loss == pytest.approx(one.loss, rel=1e-6)


def test_a_rank_that_sees_no_earlier_result_measures_what_the_first_measures(out):
    """A rank that measured alone would wait for the others."""
    (file,) = (out / "spread-evaluation").rglob("non_overlapping.json")
    kept = {str(each.length): each.loss for each in load(file).measurements}
    assert list(kept) == ["17", "34"]
    assert all(json.loads((out / f"again-{rank}.json").read_text()) == kept for rank in (0, 1))


def test_two_ranks_with_different_weights_measure_nothing(out):
    """A window would go through layers of both models."""
    refused = (out / "mixed.txt").read_text()
    assert refused.startswith(f"rank 1 of 2: {out / 'fsdp-rope' / 'model'} has checksum ")
    assert not list((out / "mixed").rglob("non_overlapping.json"))


def test_windows_over_two_ranks_end_where_a_table_of_positions_ends(out):
    """Padding to equal chunks reads no row, and both ranks refuse a position that one has."""
    model, tokens = table()
    with torch.no_grad():
        logits = model.double()(input_ids=tokens[:, :18]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:19], reduction="none"
    )
    for rank in (0, 1):
        found = torch.load(out / f"table-{rank}.pt", weights_only=False)
        assert "position 18 is outside the learned embedding" in found[19]
        for length in (17, 18):
            assert found[length] == pytest.approx(expected[:, :length].numpy(), abs=1e-5)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes for 2 GPUs; start 2 with `torchrun"):
        parallelize.device(Hardware())
    assert parallelize.device(Hardware(device="cpu")).type == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert parallelize.device(Hardware()).type == "cuda"


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=r"PyTorch sees no GPU; take .*device cpu"):
        parallelize.device(Hardware(device="cuda"))
    assert parallelize.device(Hardware()).type == "cpu"


def test_a_gradient_has_the_strides_that_ddp_expects():
    """An axis of one entry may have any stride, and DDP compares it with the parameter's."""
    odd = torch.arange(6.0).as_strided((2, 3, 1), (3, 1, 3))
    plain = parallelize._with_plain_strides(odd)
    assert plain.stride() == torch.empty(2, 3, 1).stride() != odd.stride()
    assert torch.equal(plain, odd) and plain.data_ptr() == odd.data_ptr()


@pytest.mark.parametrize(
    ("hardware", "ranks", "message"),
    [
        ({"context_parallel": 2}, 3, "hardware.context_parallel=2 does not divide 3 devices"),
        ({"context_parallel": 3}, 3, "training.length=16 is not a multiple of 6"),
        ({"context_parallel": 2, "micro_batch_size": 4}, 6, "micro_batch_size=4 x 3 groups of"),
    ],
)
def test_a_sequence_that_cannot_be_spread_is_refused(monkeypatch, data, hardware, ranks, message):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError, match=message):
        check(recipe(data, "out", hardware=hardware))


def test_graphs_of_a_spread_sequence_are_refused():
    with pytest.raises(UserError, match=r"with hardware.context_parallel take 'blocks'"):
        Hardware(compile="graphs", context_parallel=2)


@pytest.mark.parametrize(
    ("scheme", "given", "message"),
    [
        ("randomized-rope", {}, "randomised positions need whole sequences"),
        ("nope", {"attention_mask": torch.ones(1, 4)}, "spreads whole sequences over devices"),
    ],
)
def test_what_a_part_of_a_sequence_cannot_be_is_refused(scheme, given, message):
    model = DapeForCausalLM(
        DapeConfig(
            scheme=scheme, vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    devices = ContextParallel("none", 0, 2)
    with pytest.raises(UserError, match=message):
        model(input_ids=torch.zeros(1, 4).long(), context_parallel=devices, **given)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("end", "last"), [(None, 23), (19, 18)])
def test_a_position_beyond_the_table_is_refused_by_every_device(rank, end, last):
    """The second of two devices has the tokens in the middle, all of them in the table."""
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DapeForCausalLM(DapeConfig(scheme="learned", train_length=18, **sizes))
    devices = ContextParallel("none", rank, 2, end)
    with pytest.raises(UserError, match=f"position {last} is outside the learned embedding"):
        model(torch.zeros(1, 12).long(), use_cache=False, context_parallel=devices)
