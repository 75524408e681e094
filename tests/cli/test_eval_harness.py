"""`dape eval harness` on tasks made here: the numbers are worked out from the model's logits."""

import json
import math
import shutil
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config

from dape.data.tokenizer import byte, fingerprint
from dape.evaluate import harness
from dape.evaluate.request import Score, scores
from dape.model.modeling import DapeForCausalLM
from folders import dape, make_run, prepare, refused

TEXTS = ["abcd abc \u00e9 bad cab.", "dab cab abba", "c"]
QUESTIONS = [
    {"context": 10 * "abcd ", "choices": ["a", "b", "\u00e9", "ddd"], "answer": 0},
    {"context": 9 * "dcba ", "choices": ["bc", "a", "cc", " "], "answer": 2},
    {"context": "a", "choices": ["d", "c", "b", "a"], "answer": 1},
    {"context": 7 * "bad ", "choices": ["ab", "ba", "da", "ad"], "answer": 3},
]
END = 256
LENGTHS = (8, 16, 64)
GENERATED = 3  # tokens of a generation, which leave less of the prompt


def task(folder, name, documents, **settings):
    rows = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}.jsonl").write_text(rows)
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 7},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    task(
        folder,
        "rolling",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    task(
        folder,
        "choosing",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    task(
        folder,
        "continuing",
        QUESTIONS,
        output_type="generate_until",
        doc_to_text="{{context}}",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["."], "max_gen_toks": GENERATED, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder / "kerple", prepare(folder), "kerple")


@pytest.fixture(autouse=True)
def lm_eval(tmp_path, monkeypatch):
    """Give lm-eval a cache of its own; what it says of the machine, by `pip list`, we drop."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def result(run, name, length):
    return json.loads((run / "harness" / f"{name}-{length}.json").read_text())


def log_probabilities(model, context, continuation):
    """Return the log-probability of each token of the continuation after the context."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0].double()
    rows = logits[len(context) - 1 : -1].log_softmax(-1)
    return rows[range(len(continuation)), continuation].tolist()


def bits_per_byte(model, length):
    """Return it over windows that meet in one token, the last of which reaches back to be full."""
    total = 0.0
    for text in TEXTS:
        tokens = [END, *text.encode()]
        for first in range(1, len(tokens), length):
            window = tokens[first : first + length]
            context = tokens[max(0, first + len(window) - 1 - length) : first]
            total += sum(log_probabilities(model, context, window))
    return -total / math.log(2) / sum(len(text.encode()) for text in TEXTS)


def accuracy(model, length):
    """Return how often the right choice is likeliest, after the last tokens that fit."""
    right = []
    for question in QUESTIONS:
        sums = []
        for choice in question["choices"]:
            context, answer = list(question["context"].encode()), list(choice.encode())
            context = context[-(length + 1 - len(answer)) :]
            sums.append(sum(log_probabilities(model, context, answer)))
        right.append(sums.index(max(sums)) == question["answer"])
    return sum(right) / len(right)


def test_requests_keep_as_many_tokens_as_asked_whatever_the_model_was_trained_at(
    run, tasks, capsys
):
    words = ("--tasks", "rolling,choosing", "--include-path", tasks, "--lengths", "8,16,64")
    assert not dape("eval", "harness", run, *words)
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    found = {}
    for length in LENGTHS:
        content = result(run, "rolling", length)
        ((metric, value, error),) = (score.values() for score in content["scores"])
        assert (metric, error) == ("bits_per_byte", None)
        assert value == pytest.approx(bits_per_byte(model, length), rel=1e-5)
        found[length] = value
        ((metric, value, error),) = (s.values() for s in result(run, "choosing", length)["scores"])
        right = accuracy(model, length)
        assert (metric, value) == ("acc", right)
        sd = math.sqrt(right * (1 - right) * 4 / 3)  # of the sample
        assert error == pytest.approx(sd / 2, rel=1e-6)
    assert len(set(found.values())) == 3
    shown = capsys.readouterr()
    table = shown.out
    assert "already-initialized" not in shown.err  # nothing of how we call lm-eval
    for length in LENGTHS:
        assert f"{found[length]:.4g}" in table


def test_the_file_tells_what_was_asked_and_what_was_cut(run, tasks):
    words = ("--tasks", "choosing", "--include-path", tasks, "--lengths", "8,64", "--again")
    dape("eval", "harness", run, *words)
    content = result(run, "choosing", 8)
    assert (content["version"], content["samples"], content["max_length"]) == ("7", 4, 8)
    assert (content["scheme"], content["train_length"], content["seed"]) == ("kerple", 16, 0)
    assert content["provenance"]["versions"]["lm-eval"]
    assert content["provenance"]["command"].startswith(f"dape eval harness {run} --tasks choosing")
    over = {  # lm-eval asks once for choices that differ in their last token
        (question["context"], choice.encode()[:-1])
        for question in QUESTIONS
        for choice in question["choices"]
        if len(question["context"].encode()) + len(choice.encode()) > 8 + 1
    }
    assert content["cut"] == len(over) == 9
    assert result(run, "choosing", 64)["cut"] == 0


@pytest.mark.parametrize("batch_tokens", [1, 16384])
def test_each_prompt_that_is_cut_before_a_generation_counts(run, tasks, batch_tokens):
    words = ("--tasks", "continuing", "--include-path", tasks, "--lengths", "16,48,64", "--again")
    assert not dape("eval", "harness", run, *words, "--batch-tokens", batch_tokens)
    for length in (16, 48, 64):
        over = [each for each in QUESTIONS if len(each["context"]) > length - GENERATED]
        assert result(run, "continuing", length)["cut"] == len(over)
    assert len(over) == 0


def test_generations_are_those_of_greedy_decoding_after_the_cut(run, tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    found, generate = [], HFLM.generate_until

    def heard(self, requests, **options):
        found.extend(zip(requests, answers := generate(self, requests, **options), strict=True))
        return answers

    monkeypatch.setattr(HFLM, "generate_until", heard)
    words = ("--tasks", "continuing", "--include-path", tasks, "--lengths", "16", "--again")
    assert not dape("eval", "harness", run, *words)
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    assert len(found) == len(QUESTIONS)
    for request, answer in found:
        tokens, new = list(request.args[0].encode())[-(16 - GENERATED) :], []
        while len(new) < GENERATED and not {END, ord(".")} & {*new}:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens + new])).logits
            new.append(int(logits[0, -1].argmax()))
        assert answer == byte().decode(new, skip_special_tokens=True).split(".")[0]


def test_without_lengths_it_is_the_training_length_and_a_limit_is_heeded(run, tasks):
    words = ("--include-path", tasks, "--limit", 2)
    assert not dape("eval", "harness", run, "--tasks", "rolling", *words)
    assert result(run, "rolling", 16)["samples"] == 2


def test_learned_positions_that_end_are_a_dash_with_the_reason(tmp_path, tasks, capsys):
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    config.bos_token_id = config.eos_token_id = END
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte().save_pretrained(tmp_path)
    words = ("--include-path", tasks, "--lengths", "16,32")
    assert not dape("eval", "harness", tmp_path, "--tasks", "choosing", *words)
    assert result(tmp_path, "choosing", 16)["scores"]
    refusal = result(tmp_path, "choosing", 32)
    reason = "no learned position for row 31: the table has 16 rows"
    assert (refusal["scores"], refusal["refused"]) == ([], reason)
    assert f"choosing at 32: {reason}." in " ".join(capsys.readouterr().out.split())


def test_an_answer_that_does_not_fit_is_told(run, tasks, capsys):
    words = ("--include-path", tasks, "--lengths", "2")
    assert not dape("eval", "harness", run, "--tasks", "choosing", *words)
    assert result(run, "choosing", 2)["refused"] == "an answer alone is longer than 2 tokens"


def test_an_answer_that_does_not_fit_in_one_task_refuses_no_other(run, tasks, tmp_path):
    words = ("--tasks", "choosing,rolling", "--include-path", tasks, "--lengths", "2")
    assert not dape("eval", "harness", run, *words, "--out", tmp_path)
    kept = tmp_path / run.name
    assert result(kept, "choosing", 2)["refused"] == "an answer alone is longer than 2 tokens"
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    ((metric, value, _),) = (each.values() for each in result(kept, "rolling", 2)["scores"])
    assert metric == "bits_per_byte"
    assert value == pytest.approx(bits_per_byte(model, 2), rel=1e-5)


def test_mistakes_are_one_line_with_the_remedy(run, tasks, tmp_path, capsys, monkeypatch):
    words = ("eval", "harness", run, "--tasks")
    missing = tmp_path / "nothing"
    assert "the folder does not exist" in refused(capsys, *words, "a", "--include-path", missing)
    assert "unknown option '--documents'" in refused(capsys, *words, "a", "--documents", 3)
    # lm-eval's own tasks, which take it 15 seconds to list, are those of this folder here
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks / "manager.py"))
    message = refused(capsys, *words, "roling")
    assert "lm-eval knows no task 'roling'; did you mean rolling?" in message
    (tasks / "rolling.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert dape(*words, "rolling") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: the data of rolling are not available" in last
    (tmp_path / "elsewhere.jsonl").rename(tasks / "rolling.jsonl")


@pytest.mark.parametrize("package", ["lm_eval.tasks", "accelerate"])
def test_without_lm_eval_the_remedy_is_to_install_it(run, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, "eval", "harness", run, "--tasks", "wikitext")
    expected = "`dape eval harness` needs lm-eval: pip install '.[harness]' in a clone of dape"
    assert message == f"dape: error: {expected}"


def test_tasks_that_were_measured_are_not_measured_again(run, tasks, tmp_path, capsys, monkeypatch):
    words = ("eval", "harness", run, "--include-path", tasks, "--out", tmp_path / "out")
    words += ("--lengths", "8,16", "--tasks")
    assert not dape(*words, "rolling")
    first = capsys.readouterr().out
    asked = []
    measure = harness.Request.ask
    monkeypatch.setattr(
        harness.Request, "ask", lambda self, *of: asked.append(of[0]) or measure(self, *of)
    )
    assert not dape(*words, "rolling")
    again = capsys.readouterr()
    assert again.out == first and "rolling measured before; --again measures again" in again.err
    assert asked == []
    file = tmp_path / "out" / run.name / "harness" / "rolling-8.json"
    content = json.loads(file.read_text())
    assert content["tokenizer"] == fingerprint(byte())
    file.write_text(json.dumps(content | {"tokenizer": None}))  # as an earlier version wrote
    earlier = {"tasks": ["rolling"], "lengths": [8], "include_path": tasks, "out": tmp_path / "out"}
    (kept,) = harness.evaluate_harness(run, **earlier)
    assert kept.tokenizer == content["tokenizer"] and asked == []
    assert not dape(*words, "rolling,choosing") and asked == ["choosing"] * 2
    assert not dape(*words, "choosing", "--limit", 2) and asked == ["choosing"] * 4
    assert not dape(*words, "choosing", "--again") and asked == ["choosing"] * 6


def test_a_group_is_measured_again_unless_all_of_it_is_there(run, tasks, tmp_path):
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    group = {"group": "both", "task": ["rolling", "choosing"]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    ask = {"lengths": [16], "include_path": folder, "out": tmp_path / "out"}
    first = harness.evaluate_harness(run, ["both"], **ask)
    assert harness.evaluate_harness(run, ["both"], **ask) == first
    (tmp_path / "out" / "kerple" / "harness" / "rolling-16.json").unlink()
    again = harness.evaluate_harness(run, ["both"], **ask)
    assert [each.scores for each in again] == [each.scores for each in first]
    assert (tmp_path / "out" / "kerple" / "harness" / "rolling-16.json").is_file()
    changed = yaml.safe_load((folder / "rolling.yaml").read_text()) | {"metadata": {"version": 8}}
    (folder / "rolling.yaml").write_text(yaml.safe_dump(changed))
    versions = {each.task: each.version for each in harness.evaluate_harness(run, ["both"], **ask)}
    assert versions["rolling"] == "8", "another task is measured again"


def test_a_metric_has_the_error_of_its_own_filter():
    entry = {
        "alias": "a task",
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": 0.1,
        "exact_match,none": 0.75,
        "exact_match_stderr,none": "N/A",
        "f1,none": 0.25,
        "f1_stderr,none": math.nan,  # of a single document
    }
    expected = [Score("exact_match,strict", 0.5, 0.1), Score("exact_match", 0.75, None)]
    expected += [Score("f1", 0.25, None)]
    assert scores(entry) == expected
