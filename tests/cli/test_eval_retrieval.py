"""`dape eval retrieval` and `dape plot retrieval` on small run folders."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from dape.data.shards import Corpus
from dape.data.tokenizer import byte, fingerprint, saved
from dape.evaluate.prompts import needle, passkey
from dape.evaluate.trials import Plan, retrieve
from dape.model.modeling import DapeForCausalLM
from folders import dape, make_run, prepare, refused, text

ASKED = ("--lengths", "350,400", "--depths", "0,0.5,1", "--trials", "2", "--seed", "5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("made")
    return [make_run(folder / f"kerple-{seed}", corpus, "kerple", seed) for seed in (0, 1)]


@pytest.fixture
def runs(tmp_path, made):
    for run in made:
        shutil.copytree(run, tmp_path / run.name)
    return [tmp_path / run.name for run in made]


def record(run, task):
    return json.loads((run / "retrieval" / f"{task}.json").read_text())


def test_the_file_holds_what_the_model_itself_says_of_the_numbers(runs, corpus, capsys):
    assert not dape("eval", "retrieval", *runs, "--tasks", "passkey,needle", *ASKED)
    tasks = {"passkey": passkey(byte()), "needle": needle(byte(), Corpus(corpus), "test")}
    for run in runs:
        model = DapeForCausalLM.from_pretrained(run / "model").eval()
        for name, prompts in tasks.items():
            content = record(run, name)
            assert len(content["cells"]) == 6
            for cell in content["cells"]:
                losses = []
                for trial in range(2):
                    prompt = prompts.make(cell["length"], cell["depth"], trial, seed=5)
                    tokens = torch.from_numpy(prompt.tokens)[None]
                    labels = tokens.clone()
                    labels[:, : -prompt.answer] = -100
                    with torch.no_grad():
                        loss = model(input_ids=tokens, labels=labels).loss.item()
                    losses.append(-loss * prompt.answer)
                expected = pytest.approx(sum(losses) / 2, rel=1e-5)
                assert cell["log_probability"] == expected
    shown = capsys.readouterr()
    assert f"{runs[1]}  needle  length 400  exact 0%" in shown.err
    assert "Passkey: whole number right" in shown.out and "Needle: whole" in shown.out


def test_the_file_tells_where_its_numbers_come_from(runs, corpus):
    dape("eval", "retrieval", runs[0], "--tasks", "passkey,needle", *ASKED)
    content = record(runs[0], "needle")
    words = " ".join(ASKED)
    command = f"dape eval retrieval {runs[0]} --tasks passkey,needle {words}"
    assert content["provenance"]["command"] == command
    assert content["plan"] == {"lengths": [350, 400], "depths": [0, 0.5, 1], "trials": 2, "seed": 5}
    assert (content["scheme"], content["seed"], content["train_length"]) == ("kerple", 0, 16)
    assert content["data"] == Corpus(corpus).checksum
    assert content["split"] == "test"
    other = record(runs[0], "passkey")
    assert other["data"] is None and other["split"] is None
    assert other["tokenizer"] == fingerprint(byte()) and content["tokenizer"] is None


def test_needles_of_another_split_are_measured_and_not_drawn_together(tmp_path, capsys):
    sizes = {"train": 50, "validation": 700, "test": 700}
    for split, size in sizes.items():
        (tmp_path / "text" / split).mkdir(parents=True)
        words = text(size, random.Random(split))
        (tmp_path / "text" / split / "0.txt").write_text(words)
    assert not dape("prepare", tmp_path / "text", "--out", tmp_path / "data", "--workers", "1")
    runs = [make_run(tmp_path / f"run-{n}", tmp_path / "data", "kerple", n) for n in (0, 1)]
    asked = ("--tasks", "needle", "--lengths", "400", "--depths", "0.5", "--trials", "2")
    assert not dape("eval", "retrieval", *runs, *asked)
    first = [record(run, "needle")["cells"] for run in runs]
    assert not dape("eval", "retrieval", runs[0], *asked, "--split", "validation")
    (second,) = record(runs[0], "needle")["cells"]
    prompts = needle(byte(), Corpus(tmp_path / "data"), "validation")
    model = DapeForCausalLM.from_pretrained(runs[0] / "model").eval()
    found, _ = retrieve(model, prompts, Plan((400,), (0.5,), trials=2, seed=0), batch_tokens=400)
    assert second["log_probability"] == pytest.approx(found[0].log_probability, rel=1e-5)
    assert second["log_probability"] != pytest.approx(first[0][0]["log_probability"], rel=1e-5)
    capsys.readouterr()
    line = refused(
        capsys, "plot", "retrieval", *runs, "--task", "needle", "--out", tmp_path / "map.md"
    )
    assert "had different prompts (task, corpus, split, " in line


def test_passkeys_of_a_tokenizer_changed_meanwhile_are_measured_again(runs):
    run, asked = runs[0], ("--lengths", "350", "--depths", "0.5", "--trials", "2")
    assert not dape("eval", "retrieval", run, "--tasks", "passkey", *asked)
    (first,) = record(run, "passkey")["cells"]
    file = run / "model" / "tokenizer.json"
    changed = json.loads(file.read_text())
    vocabulary = changed["model"]["vocab"]
    e, z = (f"<0x{ord(letter):02X}>" for letter in "ez")
    vocabulary[e], vocabulary[z] = vocabulary[z], vocabulary[e]
    file.write_text(json.dumps(changed))
    assert not dape("eval", "retrieval", run, "--tasks", "passkey", *asked)
    (second,) = record(run, "passkey")["cells"]
    prompts = passkey(saved(str(run / "model")))
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    (expected,), _ = retrieve(model, prompts, Plan((350,), (0.5,), 2, seed=0), batch_tokens=350)
    assert second["log_probability"] == pytest.approx(expected.log_probability, rel=1e-5)
    assert second["log_probability"] != pytest.approx(first["log_probability"], rel=1e-5)


def test_seeds_share_a_panel_and_the_plot_says_so(runs, tmp_path, capsys):
    dape("eval", "retrieval", *runs, "--tasks", "passkey", *ASKED)
    command = (
        capsys.readouterr().out.splitlines()[-1].removeprefix("to draw the results: dape ").split()
    )
    out = tmp_path / "figures" / "map.png"
    assert not dape(*command[:-1], out)
    assert out.read_bytes().startswith(b"\x89PNG")
    table = tmp_path / "map.md"
    assert not dape("plot", "retrieval", *runs, "--out", table, "--metric", "log_probability")
    (row,) = (
        line for line in table.read_text().splitlines() if line.startswith("| kerple | 2 | 0.5")
    )
    means = [
        sum(
            cell["log_probability"]
            for run in runs
            for cell in record(run, "passkey")["cells"]
            if (cell["length"], cell["depth"]) == (length, 0.5)
        )
        / 2
        for length in (350, 400)
    ]
    assert row == f"| kerple | 2 | 0.5 | {means[0]:.1f} | {means[1]:.1f} |"


def test_what_no_model_or_prompt_can_do_is_a_dash_with_its_reason(tmp_path, capsys):
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=300)
    config.bos_token_id = config.eos_token_id = 256
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte().save_pretrained(tmp_path)
    words = ("--lengths", "100,300,301", "--trials", "1")
    assert not dape("eval", "retrieval", tmp_path, "--tasks", "passkey", *words)
    reasons = {
        "100": "the prompt alone has 252 tokens",
        "301": "no learned position for row 300: the table has 300 rows",
    }
    assert record(tmp_path, "passkey")["refused"] == reasons
    told = " ".join(capsys.readouterr().out.split())
    refused = f"100 tokens: {reasons['100']}; 301 tokens: {reasons['301']}"
    assert f"— gpt2 refused {refused}." in told
    assert "gpt2 1 0.25 — 0% —" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "paskey"], "unknown task 'paskey'; did you mean 'passkey'?"),
        (["--tasks", ""], "--tasks: '' names nothing; expected --tasks NAME,..."),
        (["--depths", "0,2"], "--depths 0.0,2.0: give depths from 0 to 1"),
        (["--depths", "a"], "--depths"),
        (["--trials", "0"], "--trials 0: must be at least 1"),
        (["--protocol", "sliding"], "unknown option '--protocol'"),
        (["--limit", "3"], "unknown option '--limit'"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(made, capsys, words, message):
    assert message in refused(capsys, "eval", "retrieval", made[0], "--lengths", 300, *words)


def test_perplexity_takes_no_option_of_retrieval(made, capsys):
    assert "unknown option '--trials'" in refused(capsys, "eval", made[0], "--trials", 3)


def test_a_model_without_a_tokenizer_is_one_line(runs, capsys):
    (runs[0] / "model" / "tokenizer.json").unlink()
    message = refused(capsys, "eval", "retrieval", runs[0], "--tasks", "passkey", *ASKED)
    assert "has no tokenizer.json" in message


def test_plots_of_nothing_or_of_other_questions_are_one_line(runs, tmp_path, capsys):
    out = tmp_path / "map.png"
    message = refused(capsys, "plot", "retrieval", *runs, "--out", out)
    assert (
        "the retrieval is missing; run `dape eval retrieval --tasks passkey` on the model"
        in message
    )
    dape("eval", "retrieval", runs[0], "--tasks", "passkey", *ASKED)
    dape("eval", "retrieval", runs[1], "--tasks", "passkey", *ASKED[:-1], "6")
    capsys.readouterr()
    assert "had different prompts" in refused(capsys, "plot", "retrieval", *runs, "--out", out)
    assert "must end in" in refused(capsys, "plot", "retrieval", *runs, "--out", tmp_path / "a.gif")
    assert "dape plot retrieval RUN..." in refused(capsys, "plot", "retrieval", "--out", out)
