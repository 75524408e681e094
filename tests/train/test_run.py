"""Training as a function, and what becomes of a run that is disturbed."""

import errno
import os
import shutil
from contextlib import contextmanager

import pytest
import yaml
from small import losses, metrics, recipe

import dape
from dape.data.shards import Corpus
from dape.errors import UserError
from dape.files import locked, partial_of
from dape.runs import RunFolder
from dape.train import sweep, train
from dape.train.plan import check
from dape.train.recipe import Recipe, override, read, write


@pytest.fixture
def file(data, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(write(override(recipe(data, "x"), {"out": None})))
    return file


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_notebook_trains_by_a_file_and_what_differs_from_it(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = {"steps": 2, "batch_size": 4}
    run = dape.train.train(
        str(file), scheme="alibi", seed=3, name="{scheme}-{seed}-{training.steps}", training=short
    )
    assert isinstance(run, RunFolder) and str(run) == "runs/alibi-3-2"
    assert run.finished and run.has_model and len(run.read_metrics()) == 2
    followed = read(run.recipe, Recipe)
    assert (followed.model.scheme, followed.seed) == ("alibi", 3)
    assert (followed.training.batch_size, followed.training.length) == (4, 16)
    dotted = train(file, scheme="alibi", seed=3, out="dotted", **{"training.steps": 2})
    nested = train(read(file, Recipe), out=tmp_path / "nested", seed=3, training={"steps": 2})
    assert losses(dotted.path) != losses(nested.path), "the scheme differs"
    other = {"model": {"scheme": "dape-kerple"}, "training": {"steps": 2, "batch_size": 8}}
    again = train(file, out="again", seed=3, **other)
    assert losses(again.path) == losses(nested.path)


def test_a_finished_run_is_returned_untouched(file, tmp_path):
    run = train(file, out=tmp_path / "run", training={"steps": 2})
    before = contents(tmp_path / "run")
    assert train(file, out=tmp_path / "run", training={"steps": 2}) == run
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scheme": "alibbi"}, "did you mean 'alibi'"),
        ({"trainin": {"steps": 1}}, "unknown key 'trainin'; did you mean 'training'"),
        ({"training": {"step": 1}}, r"unknown key 'training.step'; did you mean 'training.steps'"),
        ({"training.steps": "many"}, "training.steps='many': expected a whole number"),
        ({"data": "nowhere"}, "no finished corpus in nowhere"),
        ({"model": {"vocab_size": 3}}, "model.vocab_size=3 is less than the 257 tokens"),
    ],
)
def test_a_mistake_in_the_overrides_is_named(file, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(file, out=tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_every_combination(file):
    grid = {"model.scheme": ["kerple", "alibi"], "training.steps": [1, 2], "seed": [0, 5]}
    first = override(read(file, Recipe), {"name": "{scheme}-{training.steps}-{seed}"})
    found = [(r.model.scheme, r.training.steps, r.seed) for r in sweep(first, grid)]
    assert found == [
        *(("kerple", 1, 0), ("kerple", 1, 5), ("kerple", 2, 0), ("kerple", 2, 5)),
        *(("alibi", 1, 0), ("alibi", 1, 5), ("alibi", 2, 0), ("alibi", 2, 5)),
    ]
    with pytest.raises(UserError, match=r"model.scheme=kerple,alibi would share a folder"):
        sweep(override(first, {"name": "x"}), {"model.scheme": ["kerple", "alibi"]})


def test_values_of_options_are_checked_before_anything_is_loaded(file):
    first = override(read(file, Recipe), {"model.scheme": "dape-kerple"})
    check(first)
    with pytest.raises(UserError, match="hidden=0 must be at least 1"):
        check(override(first, {"model.scheme_options": {"adapter": {"hidden": 0}}}))


def test_two_trainings_in_one_folder_are_one_too_many(file, tmp_path):
    out = tmp_path / "run"
    with locked(out, "busy"), pytest.raises(UserError, match="another process is training in"):
        train(file, out=out, training={"steps": 2})
    out.mkdir()
    (out / ".lock").touch()  # of a process that was killed
    run = train(file, out=out, training={"steps": 2})
    assert run.finished and not (out / ".lock").exists()


def lock_after(act, monkeypatch):
    """Let another process `act` between the look at a folder and the lock on the folder."""

    @contextmanager
    def late(folder, busy):
        monkeypatch.undo()
        act()
        with locked(folder, busy):
            yield

    monkeypatch.setattr("dape.train.run.locked", late)


def test_a_run_that_ends_while_another_process_takes_the_lock_is_left(file, tmp_path, monkeypatch):
    """The model would be written again, under whoever reads the model."""
    short, ended = {"out": tmp_path / "run", "training": {"steps": 2}}, {}
    lock_after(lambda: ended.update(contents(train(file, **short).path)), monkeypatch)
    train(file, **short)
    assert ended and contents(tmp_path / "run") == ended


def test_another_recipe_that_trains_while_the_lock_is_taken_is_found(file, tmp_path, monkeypatch):
    """The run would go on from the weights of the other recipe."""
    short = {"out": tmp_path / "run", "training": {"steps": 2}}
    lock_after(lambda: train(file, seed=5, **short), monkeypatch)
    with pytest.raises(UserError, match=r"holds a run with other settings: seed=0 \(was 5\)"):
        train(file, **short)


@pytest.mark.parametrize("ends", [True, False])
def test_the_first_process_says_for_all_whether_a_run_is_finished(
    file, tmp_path, monkeypatch, ends
):
    """By its own look at a run that another process ends, a rank would leave, or wait."""
    run = train(file, out=tmp_path / "run", training={"steps": 2})
    before = contents(run.path)
    monkeypatch.setattr(RunFolder, "finished", not ends)
    monkeypatch.setattr("dape.train.run.ranks", lambda: 2)
    monkeypatch.setattr(
        "lightning_fabric.Fabric.broadcast",
        lambda self, found: ends if isinstance(found, bool) else found,
    )
    train(file, out=run.path, training={"steps": 2})
    assert (contents(run.path) == before) == ends


def test_the_end_is_recorded_before_any_process_returns(file, tmp_path, monkeypatch):
    """A script on all ranks may read the record next."""
    run, seen = RunFolder(tmp_path / "run"), []
    barrier = "lightning_fabric.Fabric.barrier"
    monkeypatch.setattr(barrier, lambda self, name=None: seen.append(run.finished))
    train(file, out=run.path, training={"steps": 2})
    assert seen[-1]


def test_a_run_killed_at_its_first_write_starts(file, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    partial_of(run.recipe).write_text("name: ha")
    train(file, out=run.path, training={"steps": 2})
    assert run.finished and not list(run.path.rglob("*.partial"))


def test_a_corpus_without_its_tokenizer_is_refused_at_the_start(data, file, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "tokenizer")
    with pytest.raises(
        UserError, match=r"tokenizer has no tokenizer.json; prepare the corpus again"
    ):
        Corpus(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"tokenizer has no tokenizer.json; prepare the corpus again"
    ):
        train(file, data=tmp_path / "data", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "cut shards": lambda saved: cut(saved / "__0_0.distcp"),
    "no shards": lambda saved: (saved / "__0_0.distcp").unlink(),
    "cut metadata": lambda saved: cut(saved / ".metadata"),
    "empty metadata": lambda saved: (saved / ".metadata").write_bytes(b""),
    "no metadata": lambda saved: (saved / ".metadata").unlink(),
    "cut progress": lambda saved: cut(saved / "progress.json"),
    "no progress": lambda saved: (saved / "progress.json").unlink(),
    "a pipe for metadata": lambda saved: pipe(saved / ".metadata"),
    "a pipe for shards": lambda saved: pipe(saved / "__0_0.distcp"),
    "another step": lambda saved: (saved / "progress.json").write_text('{"step": 9, "seconds": 1}'),
}


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """Return a run with checkpoints at steps 2 and 4 of 6, and the losses of all steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    keep = {"checkpoint_every": 2, "keep_checkpoints": 3}
    run = train(recipe(data, folder, tracking=keep))
    whole = losses(folder)
    shutil.rmtree(run.checkpoint(6))
    run.update_record({"ended": None})
    return run, whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_gives_way_to_the_one_before(interrupted, tmp_path, capsys, damage):
    run, whole = interrupted
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunFolder(tmp_path / "run")
    DAMAGES[damage](copy.checkpoint(4))
    train(override(read(run.recipe, Recipe), {"out": copy.path}))
    said = capsys.readouterr().out
    assert f"{copy.checkpoint(4)}" in said and "trying the checkpoint before" in said
    assert "from step 2" in said
    assert losses(copy.path) == whole and len(metrics(copy.path)) == 6


def test_a_checkpoint_beyond_the_last_step_is_refused(interrupted, tmp_path):
    run, _ = interrupted
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunFolder(tmp_path / "run")
    copy.checkpoint(4).rename(copy.checkpoint(7))
    (copy.checkpoint(7) / "progress.json").write_text('{"step": 7, "seconds": 1}')
    with pytest.raises(UserError, match=r"checkpoint of step 7, beyond training.steps=6"):
        train(override(read(run.recipe, Recipe), {"out": copy.path}))


def test_with_all_checkpoints_broken_the_run_says_so(interrupted, tmp_path):
    run, _ = interrupted
    shutil.copytree(run.path, tmp_path / "run")
    for saved in RunFolder(tmp_path / "run").saved_checkpoints():
        cut(saved / "__0_0.distcp")
    with pytest.raises(UserError, match=r"no checkpoint in .* is readable; delete that folder"):
        train(override(read(run.recipe, Recipe), {"out": tmp_path / "run"}))


def test_weights_can_be_read_by_whom_the_folder_can(interrupted):
    run, _ = interrupted
    modes = {file.stat().st_mode & 0o777 for file in run.path.rglob("*") if file.is_file()}
    assert len(modes) == 1 and modes != {0o600}


def test_a_merge_overrides_keys_of_a_recipe(data, tmp_path):
    (tmp_path / "merged.yaml").write_text(
        "training: &short {length: 16, steps: 3}\n"
        "model: {scheme: nope}\noptimizer: {<<: {warmup: 0.5, final: 0.0}, warmup: 0.25}\n"
    )
    found = read(tmp_path / "merged.yaml", Recipe)
    assert (found.optimizer.warmup, found.optimizer.final) == (0.25, 0.0)


@pytest.mark.parametrize("value", ["1:30", "010"])
def test_numbers_of_old_yaml_are_no_numbers(tmp_path, value):
    (tmp_path / "old.yaml").write_text(f"training: {{steps: {value}}}")
    with pytest.raises(UserError, match=f"training.steps='{value}': expected a whole number"):
        read(tmp_path / "old.yaml", Recipe)


@pytest.mark.parametrize("name", ["", ".", "/", "/abs", "../x", "a/../../x", "a\nb", "\x1b[31m"])
def test_a_name_that_leads_out_of_runs_is_refused(name):
    with pytest.raises(UserError, match="is not a valid name for a folder below runs"):
        Recipe(name=name)


def test_the_written_recipe_is_plain_yaml(data):
    written = yaml.safe_load(write(recipe(data, "x", hardware={"compile": True})))
    assert written["hardware"]["compile"] == "blocks" and written["optimizer"]["betas"] == [
        0.9,
        0.95,
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.batch_size": 10**12},
            r"training\.batch_size takes .* GiB at least, and cpu has",
        ),
        (
            {"training.batch_size": 10**8},
            r"(batch_size|micro_batch_size) takes .* take a smaller value",
        ),
        ({"model.hidden_size": 10**7}, "model takes .* GiB at least"),
        ({"model.num_hidden_layers": 10**9}, "must be at most 10000"),
        ({"training.steps": 2**63}, r"training\.steps=.* must be less than 2\*\*63"),
        ({"optimizer.weight_decay": float("inf")}, "weight_decay=inf must be a finite number"),
        ({"model.scheme_options": {"adapter": {"hidden": 1.5}}}, "hidden=1.5 must be a whole"),
        ({"model.scheme_options": {"adapter": {"hidden": True}}}, "hidden=True must be a whole"),
        ({"model.scheme_options": {"adapter": {"residual": "no"}}}, "residual='no' must be True"),
    ],
)
@pytest.mark.unhooked  # the hook that checks types would refuse some of them first
def test_what_cannot_be_is_refused_before_the_folder_is_made(file, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(file, scheme="dape-kerple", out=tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_a_killed_process_should_have_dropped_goes(interrupted, tmp_path):
    run, _ = interrupted
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    again = override(read(run.recipe, Recipe), {"out": copy.path, "tracking.keep_checkpoints": 1})
    train(again)
    shutil.copytree(copy.checkpoint(6), copy.checkpoint(4))
    (copy.checkpoint(4) / "__0_0.distcp").unlink()  # killed while it dropped it
    copy.update_record({"ended": None})
    train(again)
    assert copy.saved_checkpoints() == [copy.checkpoint(6)]


def test_what_was_left_at_the_very_end_goes_with_the_next_start(file, tmp_path):
    run = train(file, out=tmp_path / "run", training={"steps": 2})
    for name in (".lock", "run.json.partial"):
        (run.path / name).touch()
    train(file, out=run.path, training={"steps": 2})
    assert not list(run.path.glob("*.partial")) and not (run.path / ".lock").exists()


def test_metrics_that_were_lost_are_told(interrupted, tmp_path, capsys):
    run, whole = interrupted
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    again = override(read(run.recipe, Recipe), {"out": copy.path})
    copy.metrics.write_text(copy.metrics.read_text().partition("\n")[0] + "\n")
    train(again)
    assert f"{copy.metrics} has no metrics of steps 2 to 4\n" in capsys.readouterr().out
    assert losses(copy.path) == [whole[0], *whole[4:]]
    train(override(again, {"out": shutil.copytree(run.path, tmp_path / "other")}))
    assert "has no metrics" not in capsys.readouterr().out


def test_a_disk_that_fills_up_at_a_checkpoint_is_an_error_of_the_system(
    file, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(file, out=tmp_path / "run", training={"steps": 2})
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
