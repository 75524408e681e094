import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from small import batch, losses, metrics, recipe, validation_loss
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from dape import DapeConfig, DapeForCausalLM
from dape.cli import main
from dape.data.shards import Corpus, Windows
from dape.errors import UserError
from dape.train import graphs, task
from dape.train.recipe import Recipe, read, write
from dape.train.run import train
from dape.train.sections import Hardware
from dape.train.task import LanguageModelling


def run(settings):
    return train(settings).path


def unfinish(folder, *steps):
    """Take back the end of a run, and its checkpoints after some steps."""
    known = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(known | {"ended": None}))
    for step in steps:
        shutil.rmtree(folder / f"checkpoints/step-{step:08d}")


def command(settings, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(write(settings))
    return ["train", str(file)]


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """Return the recipe and the folder of an uninterrupted run."""
    settings = recipe(data, tmp_path_factory.mktemp("runs") / "whole")
    return settings, run(settings)


def test_training_is_what_plain_pytorch_does(finished, data):
    _, folder = finished
    corpus = Corpus(data)
    windows = Windows(corpus.split("train"), 16, seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = DapeForCausalLM(DapeConfig(vocab_size=corpus.vocab_size, train_length=16, **sizes))
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and "norm" not in name}
    matrices = {name for name in matrices if "adapter" not in name and "bias" not in name}
    groups = [[], []]
    for name, parameter in model.named_parameters():
        groups[name in matrices].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[1], "weight_decay": 0.1}, {"params": groups[0], "weight_decay": 0}],
        betas=(0.9, 0.95),
    )
    for step, entry in enumerate(metrics(folder), start=1):
        tokens = torch.from_numpy(batch(windows, step - 1, 8))
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        cosine = (1 + math.cos(math.pi * (step - 3) / 3)) / 2
        rate = 1e-2 * (step / 3 if step <= 3 else 0.1 + 0.9 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert entry["grad_norm"] > 1, "or the clipping goes untested"
        assert entry["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert (entry["step"], entry["tokens"]) == (step, step * 8 * 16)
    assert step == 6
    assert entry["validation_loss"] == pytest.approx(
        validation_loss(model, corpus, batches=8), rel=1e-6
    )


def test_the_exported_model_has_the_last_validation_loss(finished):
    settings, folder = finished
    model = DapeForCausalLM.from_pretrained(folder / "model").eval()
    corpus = Corpus(settings.data)
    logged = {entry["step"]: entry.get("validation_loss") for entry in metrics(folder)}
    assert [step for step, loss in logged.items() if loss is not None] == [4, 6]
    assert logged[6] < logged[4]
    assert validation_loss(model, corpus, batches=8) == pytest.approx(logged[6], rel=1e-6)
    assert model.config.scheme == "dape-kerple" and model.config.train_length == 16
    assert model.config.eos_token_id == corpus.end_of_text
    assert (folder / "model" / "tokenizer.json").is_file()


def test_the_record_of_a_run(finished):
    settings, folder = finished
    record = json.loads((folder / "run.json").read_text())
    assert record["data"] == {"path": settings.data, "checksum": Corpus(settings.data).checksum}
    assert (record["seed"], record["scheme"], record["train_length"]) == (0, "dape-kerple", 16)
    model = DapeForCausalLM.from_pretrained(folder / "model")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert (record["step"], record["tokens"]) == (6, 768)
    assert record["started"] <= record["ended"] and record["seconds"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert read(folder / "config.yaml", Recipe) == settings


@pytest.mark.parametrize(
    "hardware", [{"micro_batch_size": 2}, {"activation_checkpointing": True}], ids=str
)
def test_the_layout_of_the_work_changes_nothing(finished, data, tmp_path, hardware):
    folder = run(recipe(data, tmp_path / "run", hardware=hardware))
    assert losses(folder) == pytest.approx(losses(finished[1]), rel=1e-6)
    found, expected = (
        [entry["validation_loss"] for entry in metrics(each) if "validation_loss" in entry]
        for each in (folder, finished[1])
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_clip_norm_of_null_clips_nothing(finished, data, tmp_path):
    found, expected = (
        metrics(run(recipe(data, tmp_path / str(norm), optimizer={"clip_norm": norm})))
        for norm in (None, 1e30)
    )
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in found] == [entry[name] for entry in expected]
    assert [entry["loss"] for entry in found[2:]] != losses(finished[1])[2:], "which are clipped"


def test_mixed_precision_keeps_weights_in_float32(finished, data, tmp_path):
    settings = recipe(data, tmp_path / "run", training={"precision": "bf16-mixed"})
    folder = run(settings)
    assert losses(folder) == pytest.approx(losses(finished[1]), rel=5e-3)
    assert losses(folder) != losses(finished[1])
    model = DapeForCausalLM.from_pretrained(folder / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_moves_weights_and_order(finished, data, tmp_path):
    other = losses(run(recipe(data, tmp_path / "run", seed=1)))
    assert all(a != b for a, b in zip(other, losses(finished[1]), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_resumed_run_repeats_its_losses(data, tmp_path, device):
    keep = {"checkpoint_every": 2, "keep_checkpoints": 3}
    precision = {"precision": "bf16-mixed"}
    settings = recipe(
        data, tmp_path, training=precision, tracking=keep, hardware={"device": device}
    )
    first = metrics(run(settings))
    unfinish(tmp_path, 4, 6)
    again = metrics(run(settings))
    for old, new in zip(first, again, strict=True):
        for name in ("step", "tokens", "loss", "grad_norm", "learning_rate"):
            assert old[name] == new[name]
    assert all(("mfu" in entry) == (device == "cuda") for entry in again)
    seconds = [entry["seconds"] for entry in again]
    assert seconds == sorted({*seconds}) and seconds[1] == first[1]["seconds"]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.002)


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(data, tmp_path):
    long = {"steps": 30}
    run(recipe(data, tmp_path / "whole", training=long))
    often = recipe(data, tmp_path / "killed", training=long, tracking={"checkpoint_every": 1})
    arguments = [sys.executable, "-m", "dape", *command(often, tmp_path)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    log = tmp_path / "killed" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 1000, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(losses(tmp_path / "killed")) < 30
    assert main(command(recipe(data, tmp_path / "killed", training=long), tmp_path)) == 0
    for name in ("killed", "whole"):
        assert [entry["step"] for entry in metrics(tmp_path / name)] == list(range(1, 31))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    first, second = (tmp_path / name / "model/model.safetensors" for name in ("killed", "whole"))
    assert first.read_bytes() == second.read_bytes()


def test_a_finished_run_says_so(finished, tmp_path, capsys):
    settings, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(command(settings, tmp_path)) == 0
    assert f"{folder} is finished: 6 steps, 768 tokens" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_without_updates_ends_with_no_tokens(data, tmp_path, capsys):
    settings = recipe(data, tmp_path / "run", training={"steps": 0})
    for _ in range(2):
        assert main(command(settings, tmp_path)) == 0
        assert f"{tmp_path / 'run'} is finished: 0 steps, 0 tokens" in capsys.readouterr().out


def test_killed_before_the_export_a_run_still_ends(data, tmp_path, capsys):
    settings = recipe(data, tmp_path / "run")
    whole = json.loads((run(settings) / "run.json").read_text())
    weights = tmp_path / "run/model/model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(weights.parent)
    known = {name: whole[name] for name in ("data", "started")}
    (tmp_path / "run/run.json").write_text(json.dumps(known | {"ended": None}))
    assert main(command(settings, tmp_path)) == 0
    assert "is finished: 6 steps, 768 tokens" in capsys.readouterr().out
    assert weights.read_bytes() == before
    again = json.loads((tmp_path / "run/run.json").read_text())
    assert again.keys() == whole.keys() and again["ended"] >= whole["ended"]
    for name in ("step", "tokens", "validation_loss", "seconds", "started"):
        assert again[name] == whole[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"batch_size": 4}}, "other settings: training.batch_size=4 (was 8); give"),
        ({"seed": 5}, "other settings: seed=5 (was 0); give another --name or --out"),
    ],
)
def test_another_recipe_does_not_go_on_in_the_folder(finished, tmp_path, capsys, changes, message):
    settings, folder = finished
    other = recipe(settings.data, folder, **changes)
    assert main(command(other, tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_other_data_do_not_go_on_in_the_folder(finished, tmp_path, capsys):
    settings, folder = finished
    other = tmp_path / "data"
    other.symlink_to(settings.data)
    assert main(command(recipe(str(other), folder), tmp_path)) == 0, "the same bytes elsewhere"
    record = folder / "run.json"
    text = record.read_text()
    record.write_text(text.replace(Corpus(settings.data).checksum, "0" * 64))
    assert main(command(settings, tmp_path)) == 2
    assert "holds a run on other data" in capsys.readouterr().err
    record.write_text(text)


def test_a_folder_of_other_things_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert main(command(recipe(data, tmp_path), tmp_path)) == 2
    assert "exists and is not a run" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys):
    settings = recipe(
        data,
        tmp_path / "run",
        optimizer={"learning_rate": 1e25, "warmup": 0},
        tracking={"checkpoint_every": 2},
    )
    assert main(command(settings, tmp_path)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    step = int(message.split("step ")[1].split(":")[0])
    found = losses(tmp_path / "run")
    assert 2 <= step <= 6 and len(found) == step - 1 and all(map(math.isfinite, found))
    assert f"the previous loss was {found[-1]:.4f}" in message
    assert f"windows {8 * (step - 1)} to {8 * step - 1} of split 'train' in {data}" in message
    assert "optimizer.learning_rate" in message
    assert not (tmp_path / "run/model").exists()
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoints/*"))
    assert saved == [f"step-{n:08d}" for n in range(2, step, 2)][-2:]


def test_a_gradient_that_is_not_finite_stops_the_run_before_a_checkpoint(
    data, tmp_path, monkeypatch
):
    def steep(self, model, *batch):
        weight = next(model.parameters())
        return ordinary(self, model, *batch) + (weight - weight.detach()).square().sum().sqrt()

    ordinary = LanguageModelling.loss
    monkeypatch.setattr(LanguageModelling, "loss", steep)
    settings = recipe(data, tmp_path / "run", tracking={"checkpoint_every": 1})
    with pytest.raises(UserError, match=r"step 1: loss 5\.\d+, gradient norm nan, at learning"):
        run(settings)
    assert not losses(tmp_path / "run") and not list((tmp_path / "run/checkpoints").glob("step*"))


def compiled(test):
    """Return a test that compiles, with the compiler's own warnings ignored."""
    for words in ("`torch.jit:DeprecationWarning", "The .grad attribute:UserWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{words}")(test)
    return pytest.mark.unhooked(test)


@compiled
def test_compiled_blocks_learn_the_same(data, tmp_path):
    small = {"model": {"num_hidden_layers": 1, "scheme": "nope"}, "training": {"steps": 2}}
    plain = run(recipe(data, tmp_path / "plain", **small))
    found = run(recipe(data, tmp_path / "compiled", hardware={"compile": True}, **small))
    assert losses(found) == pytest.approx(losses(plain), rel=1e-5)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize("scheme", ["nope", "kerple", "dape-kerple", "dape-fire", "dape3-kerple"])
def test_graphs_learn_the_same_and_resume(data, tmp_path, scheme):
    layout = {"device": "cuda", "micro_batch_size": 4}

    def trained(compile):
        settings = recipe(
            data,
            tmp_path / compile,
            model={"scheme": scheme},
            training={"precision": "bf16-mixed"},
            tracking={"checkpoint_every": 2, "keep_checkpoints": 3},
            hardware={**layout, "compile": compile},
        )
        return settings, run(settings)

    plain = losses(trained("none")[1])
    settings, folder = trained("graphs")
    first = losses(folder)
    assert first == pytest.approx(plain, rel=2e-3)
    unfinish(folder, 4, 6)
    assert losses(run(settings)) == pytest.approx(first, rel=1e-6)


@pytest.mark.gpu
@compiled
def test_a_pass_that_no_graph_can_hold_trains_all_the_same(data, tmp_path, capsys, monkeypatch):
    def ask_the_device(self):
        return ordinary(self) * float(torch.ones((), device="cuda"))

    ordinary = graphs.Recording._pass
    monkeypatch.setattr(graphs.Recording, "_pass", ask_the_device)
    folder = run(recipe(data, tmp_path / "run", hardware={"device": "cuda", "compile": "graphs"}))
    assert "trains without CUDA graphs" in capsys.readouterr().out
    plain = run(recipe(data, tmp_path / "plain", hardware={"device": "cuda"}))
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-4)


def test_graphs_of_shards_are_refused():
    with pytest.raises(UserError, match=r"hardware.compile='graphs' needs hardware.strategy='ddp'"):
        Hardware(compile="graphs", strategy="fsdp")


@pytest.mark.parametrize(("room", "products"), [(8 * 16, 1), (8 * 16 - 1, 4)])
def test_logits_with_room_are_computed_once(data, monkeypatch, room, products):
    """Logits of more tokens are computed in parts, and each part again in the backward pass."""
    monkeypatch.setattr(task, "TOKENS_AT_ONCE", room)
    problem = LanguageModelling(recipe(data, "out"), Corpus(data))
    model, calls = problem.build(torch.device("cpu")), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    problem.loss(model, *problem.batch("train", 0, 0, 1)).backward()
    assert len(calls) == products
