"""`dape.evaluate.evaluate`: models of every kind, what it keeps, and what it does not do twice."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CpmAntConfig,
    CpmAntForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import dape
from dape.data.shards import Corpus
from dape.data.tokenizer import byte
from dape.errors import UserError
from dape.evaluate import evaluate, evaluate_retrieval
from dape.evaluate.opening import open_model, open_models
from dape.evaluate.record import load
from dape.evaluate.results import drawing, precisions, results_folders
from dape.evaluate.watch import Watch
from dape.files import locked
from dape.model.modeling import DapeForCausalLM
from dape.runs import RunFolder, unfinished
from folders import learned_tokenizer, make_run, prepare

LENGTHS = [16, 32, 64]
LLAMA = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    return make_run(tmp_path_factory.mktemp("made") / "run", corpus, "dape-kerple")


@pytest.fixture
def run(tmp_path, made):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, intermediate_size=32))


class Heard(Watch):
    """Keeps what it hears; after so many announcements the process dies."""

    def __init__(self, most=math.inf):
        self.most, self.lines, self.fed, self.expected, self.notes = most, [], 0, None, []

    def begin(self, tokens):
        self.expected = tokens

    def advance(self, tokens):
        self.fed += tokens

    def announce(self, name, length, outcome):
        if len(self.lines) == self.most:
            raise KeyboardInterrupt
        self.lines.append((name, length, outcome.split()[0]))

    def note(self, text):
        self.notes.append(text)


def own_loss(model, corpus, targets, length):
    """Return what the model itself says of the scored tokens, one block a document."""
    losses = []
    for number in targets.documents:
        tokens = torch.from_numpy(Corpus(corpus).split("test").document(number))[None, :65]
        tokens = tokens[:, -length - 1 :]
        labels = tokens.clone()
        labels[:, : -targets.block] = -100
        with torch.no_grad():
            losses.append(model(input_ids=tokens, labels=labels).loss.item())
    return losses


def test_a_run_its_folder_as_an_object_and_its_model_in_memory_are_the_same(run, corpus):
    model = DapeForCausalLM.from_pretrained(run / "model")
    given = [str(run), model]
    first, second = dape.evaluate.evaluate(given, Corpus(corpus), LENGTHS, blocks=1)
    assert first.targets == second.targets
    assert first.measurements == second.measurements
    assert evaluate(RunFolder(run), None, LENGTHS, blocks=1)[0].measurements == first.measurements
    assert (first.subject.run, second.subject.run) == (str(run), "models[1]")
    assert (second.subject.scheme, second.subject.train_length) == ("dape-kerple", 16)
    assert second.subject.parameters == first.subject.parameters
    for measured in second.measurements:
        expected = own_loss(model.eval(), corpus, second.targets, measured.length)
        assert measured.document_losses == pytest.approx(expected, rel=1e-5)


def test_a_model_in_memory_stays_as_it_was_and_leaves_no_file(llama, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama.train()
    llama.lm_head.eval()
    before = {name: module.training for name, module in llama.named_modules()}
    (found,) = evaluate(llama, corpus, LENGTHS, blocks=1)
    assert {name: module.training for name, module in llama.named_modules()} == before
    assert list(tmp_path.iterdir()) == []
    assert found.subject.scheme == "llama" and found.subject.weights is None
    expected = own_loss(llama.eval(), corpus, found.targets, 64)
    assert found.by_length[64].document_losses == pytest.approx(expected, rel=1e-5)
    evaluate(llama, corpus, LENGTHS, blocks=1, out="kept")
    assert RunFolder(tmp_path / "kept" / "models[0]").evaluation("last").is_file()


def test_runs_of_other_recipes_are_no_seeds_of_each_other(run):
    file = run / "config.yaml"
    recipe = yaml.safe_load(file.read_text())
    first = open_model(run).settings
    changes = {
        "data": "elsewhere",
        "model": {**recipe["model"], "backend": "reference"},
        "training": {**recipe["training"], "steps": 7},
        "optimizer": {**recipe["optimizer"], "learning_rate": 0.5},
    }
    found = []
    for change in ({"seed": 9, "name": "other"}, *({name: x} for name, x in changes.items())):
        file.write_text(yaml.safe_dump(recipe | change))
        found.append(open_model(run).settings)
    assert found[0] == first and len(set(found)) == 5


def test_a_record_knows_the_texts_of_the_training(run, corpus, tmp_path):
    """Here the folder of the training has other texts since, and the model reads a second one."""
    assert open_model(run).trained_on is None, "a run without a record of them"
    RunFolder(run).update_record({"data": {"path": str(tmp_path), "checksum": "abc"}})
    (found,) = evaluate(run, corpus, LENGTHS, blocks=1)
    assert (found.subject.trained_on, found.targets.data) == ("abc", Corpus(corpus).checksum)
    saved = RunFolder(run).evaluation("last")
    assert load(saved) == found
    content = json.loads(saved.read_text())
    del content["trained_on"]
    saved.write_text(json.dumps(content))
    assert load(saved) == replace(found, subject=replace(found.subject, trained_on=None))


def test_two_models_in_memory_are_never_taken_for_one(llama, corpus):
    other = AutoModelForCausalLM.from_config(llama.config)
    found = evaluate([llama, other], corpus, LENGTHS, blocks=1)
    assert len(found) == 2 and found[0].measurements != found[1].measurements


def test_a_model_in_memory_is_named_with_its_adapters(llama, corpus):
    mounted = dape.retrofit(llama, bias="kerple")
    (found,) = evaluate(llama, corpus, [16])
    assert found.subject.scheme == "llama + dape-kerple"
    mounted.unmount()
    assert evaluate(llama, corpus, [16])[0].subject.scheme == "llama"


@pytest.mark.parametrize("whole", [False, True], ids=["adapters alone", "beside the model"])
def test_a_folder_with_adapters_is_not_taken_for_the_base(llama, corpus, tmp_path, whole):
    mounted = dape.retrofit(llama, bias="kerple")
    (llama.save_pretrained if whole else mounted.save)(tmp_path / "saved")
    with pytest.raises(UserError, match=r"/saved holds adapters of a retrofit; give the run of"):
        evaluate(tmp_path / "saved", corpus, [16])


def test_a_tokenizer_given_with_a_model_in_memory_is_compared_with_the_corpus(llama, corpus):
    evaluate(llama, corpus, [16], tokenizer=byte())
    with pytest.raises(UserError, match="not prepared with the tokenizer of"):
        evaluate(llama, corpus, [16], tokenizer=learned_tokenizer())
    with pytest.raises(UserError, match="token ids up to 256"):
        narrow = AutoModelForCausalLM.from_config(
            LlamaConfig(**{**LLAMA, "vocab_size": 200}, intermediate_size=32)
        )
        evaluate(narrow, corpus, [16])


def test_a_folder_without_a_tokenizer_is_named(llama, corpus, tmp_path):
    llama.save_pretrained(tmp_path / "llama")
    first, second = Heard(), Heard()
    evaluate(tmp_path / "llama", corpus, [16], watch=first)
    assert first.notes == [
        f"{tmp_path}/llama has no tokenizer.json; make sure that the corpus has the tokens of the"
        " model, because only the size of the vocabulary is compared"
    ]
    byte().save_pretrained(tmp_path / "llama")
    evaluate([tmp_path / "llama", llama], corpus, [16], watch=second)
    assert second.notes == []


@pytest.mark.parametrize(
    ("models", "message"),
    [([], "no model given"), (torch.nn.Linear(2, 2), "without the configuration")],
)
def test_what_is_no_model_is_refused(models, message, corpus):
    with pytest.raises(UserError, match=message):
        evaluate(models, corpus, [16])


@pytest.mark.parametrize("done", [1, 2])
def test_a_killed_evaluation_goes_on_and_ends_as_if_nothing_had_been(run, corpus, done, made):
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, corpus, LENGTHS, watch=Heard(most=done))
    folder = RunFolder(run)
    assert not folder.evaluation("last").exists()
    kept = json.loads(unfinished(folder.evaluation("last")).read_text())
    assert [each["length"] for each in kept["measurements"]] == LENGTHS[:done]
    heard = Heard()
    (found,) = evaluate(run, corpus, LENGTHS, watch=heard)
    outcomes = ["measured"] * done + ["perplexity"] * (3 - done)
    assert heard.lines == [
        (str(run), length, what) for length, what in zip(LENGTHS, outcomes, strict=True)
    ]
    assert heard.fed == heard.expected
    assert found.measurements == evaluate(run, corpus, LENGTHS, again=True)[0].measurements
    assert sorted(file.name for file in (run / "evaluation").iterdir()) == ["last.json"]


def test_what_was_measured_is_measured_anew_when_anything_is_different(run, corpus, monkeypatch):
    def outcomes(**asked):
        heard = Heard()
        evaluate(run, corpus, LENGTHS, watch=heard, **asked)
        return [outcome for *_, outcome in heard.lines]

    anew, kept = ["perplexity"] * 3, ["measured"] * 3
    assert outcomes() == anew and outcomes() == kept
    assert outcomes(again=True) == anew
    assert outcomes(documents=1) == anew  # other targets
    assert outcomes(documents=1) == kept
    assert outcomes(documents=1, precision="bf16") == anew
    assert outcomes(documents=1) == anew
    model = DapeForCausalLM.from_pretrained(run / "model")
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    model.save_pretrained(run / "model")
    assert outcomes(documents=1) == anew  # other weights
    monkeypatch.setattr("dape.provenance.commit", lambda: "another commit")
    assert outcomes(documents=1) == anew


def test_a_finished_result_is_replaced_by_less_only_with_a_word(run, corpus):
    def notes(lengths=LENGTHS, **asked):
        evaluate(run, corpus, lengths, watch=(heard := Heard()), **asked)
        return heard.notes

    said = (
        f"{run}/evaluation/last.json has other tokens, lengths or precision, and is replaced at the"
        " end of this measurement; --out FOLDER keeps the file"
    )
    assert notes() == notes() == notes(again=True) == []
    assert notes([16, 64]) == [said]
    assert notes() == [], "more than before"
    assert notes(documents=1) == notes(documents=1, precision="bf16") == [said]
    asked = {"lengths": [300, 400], "trials": 1, "depths": [0.5]}
    for change, word in (
        ({}, False),
        ({"lengths": [300, 400, 500]}, False),
        ({"lengths": [300]}, True),
        ({"seed": 1}, True),
    ):
        evaluate_retrieval(run, **asked | change, watch=(heard := Heard()))
        assert [note.startswith(f"{run}/retrieval/passkey.json has") for note in heard.notes] == [
            True
        ] * word


def test_a_kept_file_that_is_damaged_is_measured_anew(run, corpus):
    (first,) = evaluate(run, corpus, LENGTHS)
    RunFolder(run).evaluation("last").write_text('{"format": 1')
    (second,) = evaluate(run, corpus, LENGTHS)
    assert second.measurements == first.measurements


def test_only_the_lengths_that_were_asked_for_are_returned(run, corpus):
    evaluate(run, corpus, LENGTHS)
    (found,) = evaluate(run, corpus, [16, 64])
    assert found.lengths == [16, 64]


def test_results_go_to_one_folder_where_they_are_wanted_there(run, corpus, tmp_path):
    (found,) = evaluate(run, corpus, [16], out=tmp_path / "results")
    kept = RunFolder(tmp_path / "results" / "run").evaluation("last")
    assert json.loads(kept.read_text())["run"] == str(run) == found.subject.run
    assert not (run / "evaluation").exists()


def test_results_of_a_folder_above_stay_inside_and_others_are_replaced_with_a_word(
    run, corpus, tmp_path, monkeypatch
):
    out, heard = tmp_path / "results", Heard()
    twin = shutil.copytree(run, tmp_path / "twin" / "run")
    monkeypatch.chdir(run / "model")
    for _ in range(2):
        evaluate("..", corpus, [16], out=out, watch=heard)
    assert heard.notes == []
    kept = out / "run" / "evaluation" / "last.json"
    assert json.loads(kept.read_text())["run"] == ".." and [*out.iterdir()] == [out / "run"]
    assert drawing("curves", [".."], out).split()[-3] == str(out / "run")
    evaluate(twin, corpus, [16], out=out, watch=heard)
    note = f"{kept} is of .., and is replaced at the end of this measurement; --out FOLDER keeps th"
    assert [line[: len(note)] for line in heard.notes] == [note]


def test_results_that_cannot_be_written_are_refused_before_the_work(run, corpus, tmp_path):
    heard = Heard()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"results cannot be written to .*; give --out FOLDER"):
        evaluate(run, corpus, [16], out=tmp_path / "file" / "below", watch=heard)
    twin = shutil.copytree(run, tmp_path / "twin" / "run")
    with pytest.raises(UserError, match="two of the models would have their results in"):
        evaluate([run, twin], corpus, [16], out=tmp_path / "results", watch=heard)
    assert heard.expected is None


def test_a_folder_named_twice_is_measured_once(run, corpus):
    assert len(evaluate([run, str(run), run / ".." / "run"], corpus, [16])) == 1


def test_a_run_and_a_model_of_the_hub_with_its_name_are_two_models(run, monkeypatch):
    shutil.copytree(run, run.parent / "runs" / "named")
    config = open_model(run).config
    monkeypatch.setattr("dape.model.loading.load_config", lambda *_, **__: config)
    monkeypatch.chdir(run.parent)
    models = open_models(["runs/named", "named"], watch=(heard := Heard()))
    assert [each.source for each in models] == ["runs/named/model", "named"] and not heard.notes
    with (
        pytest.raises(UserError, match="would have their results in runs/named; evaluate the mod"),
        results_folders(models, None, lambda folder: []),
    ):
        pass


def test_retrieval_takes_models_in_memory_too(run):
    model = DapeForCausalLM.from_pretrained(run / "model")
    asked = {"lengths": [300], "depths": [0.5], "trials": 2}
    (kept,) = evaluate_retrieval(run, **asked)
    (held,) = evaluate_retrieval(model, tokenizer=byte(), **asked)
    assert held.cells == kept.cells and held.subject.run == "models[0]"
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        evaluate_retrieval(model, **asked)


def test_a_lower_precision_is_close_recorded_and_not_the_same(run, corpus):
    (exact,) = evaluate(run, corpus, LENGTHS)
    (close,) = evaluate(run, corpus, LENGTHS, precision="bf16")
    assert exact.provenance["precision"] == "fp32" and close.provenance["precision"] == "bf16"
    for length in LENGTHS:
        loss = exact.by_length[length].loss
        assert close.by_length[length].loss == pytest.approx(loss, rel=1e-2)
        assert close.by_length[length].loss != loss
    with pytest.raises(UserError, match="unknown precision 'int8'"):
        evaluate(run, corpus, LENGTHS, precision="int8")


def test_a_training_corpus_prepared_anew_may_hold_other_test_documents(tmp_path):
    data = prepare(tmp_path / "corpus")
    run = make_run(tmp_path / "run", data, "kerple")
    entry = {"path": str(data), "checksum": Corpus(data).checksum}
    RunFolder(run).update_record({"data": entry})
    (before,) = evaluate(run, lengths=LENGTHS)
    shutil.rmtree(tmp_path / "corpus")
    prepare(tmp_path / "corpus", seed=1)
    words = (
        rf"trained on other data: {data} has checksum \w+, not {entry['checksum'][:12]}; give --d"
    )
    with pytest.raises(UserError, match=words):
        evaluate(run, lengths=LENGTHS)
    with pytest.raises(UserError, match=words):
        evaluate_retrieval(run, ["needle"], lengths=[300])
    (asked,) = evaluate(run, data, LENGTHS)
    assert asked.targets.data == Corpus(data).checksum != before.targets.data


def moved(model):
    """Return a model with weights far from the start, so that it reads more than a token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def test_weights_saved_in_16_bits_are_measured_in_float32_where_the_record_says_so(
    llama, corpus, tmp_path
):
    moved(llama).to(torch.bfloat16).save_pretrained(tmp_path)
    byte().save_pretrained(tmp_path)
    assert open_model(tmp_path).precision(torch.device("cuda")) == "bf16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    (found,) = evaluate(tmp_path, corpus, LENGTHS, blocks=1)
    assert found.provenance["precision"] == "fp32"
    for length in LENGTHS:
        expected = own_loss(model, corpus, found.targets, length)
        assert found.by_length[length].document_losses == pytest.approx(expected, rel=1e-6)
    (asked,) = evaluate_retrieval(tmp_path, lengths=[300], depths=[0.5], trials=1)
    (held,) = evaluate_retrieval(
        model, tokenizer=byte(), lengths=[300], depths=[0.5], trials=1, precision="fp32"
    )
    assert asked.cells[0].log_probability == pytest.approx(held.cells[0].log_probability, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_in_16_bits_is_recorded_in_16_bits(llama, corpus, dtype):
    model = moved(llama).to(dtype)
    (found,) = evaluate(model, corpus, LENGTHS, blocks=1)
    assert found.provenance["precision"] == "bf16"
    for length in LENGTHS:
        expected = own_loss(model, corpus, found.targets, length)
        assert found.by_length[length].document_losses == pytest.approx(expected, rel=2e-2)
    words = rf"precision='fp32': models\[0\].* has weights in {dtype}; give model.float\(\), or"
    with pytest.raises(UserError, match=words):
        evaluate(model, corpus, LENGTHS, precision="fp32")


def test_a_cap_of_the_scores_is_not_left_out(corpus, tmp_path):
    """By the code of transformers for the cap, which its default attention does not have."""
    config = Gemma2Config(
        **LLAMA, num_key_value_heads=1, head_dim=8, intermediate_size=32,
        attn_logit_softcapping=0.5, query_pre_attn_scalar=1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = moved(Gemma2ForCausalLM(config))
    model.save_pretrained(tmp_path)
    byte().save_pretrained(tmp_path)
    (found,) = evaluate(tmp_path, corpus, LENGTHS, blocks=1)
    for length in LENGTHS:
        expected = own_loss(model, corpus, found.targets, length)
        assert found.by_length[length].document_losses == pytest.approx(expected, rel=1e-6)
    (again,) = evaluate(model, corpus, LENGTHS, blocks=1)
    assert again.by_length == found.by_length
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        UserError, match=r"models\[0\] .* leaves out attn_logit_softcapping=0.5, as"
    ):
        evaluate(model, corpus, LENGTHS)


def dynamic(**changes):
    sizes = {**LLAMA, "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 16}
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    torch.manual_seed(0)
    return moved(LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=scaled)))


def test_a_length_has_the_frequencies_of_dynamic_rope_at_this_length(corpus):
    """transformers keeps those of the longest text before, such as the last of another task."""
    model = dynamic()
    for _ in range(2):
        (found,) = evaluate(model, corpus, LENGTHS, blocks=1)
        for length in LENGTHS:
            number, block = found.targets.documents[0], found.targets.block
            tokens = Corpus(corpus).split("test").document(number)[64 - length : 65]
            tokens = torch.from_numpy(tokens)[None]
            with torch.no_grad():
                logits = dynamic()(input_ids=tokens[:, :-1]).logits[0, -block:]
            expected = torch.nn.functional.cross_entropy(logits, tokens[0, -block:]).item()
            assert found.by_length[length].document_losses[0] == pytest.approx(expected, rel=1e-6)
    asked = {"lengths": [400, 500], "depths": [0.5], "trials": 2, "tokenizer": byte()}
    both = evaluate_retrieval(model, ["passkey", "needle"], corpus=corpus, **asked)
    for each in both:
        (alone,) = evaluate_retrieval(dynamic(), [each.task], corpus=corpus, **asked)
        assert alone.cells == each.cells
    assert not any(module._forward_pre_hooks for module in model.modules())


def bert(**changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=257, **sizes, intermediate_size=32, **changes)
    return moved(BertLMHeadModel(config))


def xlnet():
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    return moved(XLNetLMHeadModel(XLNetConfig(vocab_size=257, **sizes)))


def cpmant():
    """A model for which the token 0 is padding, so that its prediction depends on no text."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "dim_head": 8}
    config = CpmAntConfig(vocab_size=257, **sizes, dim_ff=32, prompt_types=3, prompt_length=2)
    return moved(CpmAntForCausalLM(config))


@pytest.mark.parametrize("make", [bert, xlnet, cpmant])
def test_a_model_that_reads_later_tokens_is_refused(make, corpus, tmp_path):
    model = make()
    with pytest.raises(UserError, match=r"models\[0\] .* reads later tokens, and is no causal"):
        evaluate(model, corpus, LENGTHS)
    model.save_pretrained(tmp_path)
    byte().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads later tokens, and is no causal language model"):
        evaluate(tmp_path, corpus, LENGTHS)
    with pytest.raises(UserError, match="reads later tokens, and is no causal language model"):
        evaluate_retrieval(tmp_path, lengths=[300])


def test_a_bert_that_reads_from_left_to_right_is_measured(corpus):
    model = bert(is_decoder=True)
    (found,) = evaluate(model, corpus, LENGTHS, blocks=1)
    for length in LENGTHS:
        expected = own_loss(model, corpus, found.targets, length)
        assert found.by_length[length].document_losses == pytest.approx(expected, rel=1e-6)


def test_a_model_of_others_has_the_precision_of_the_runs_beside_it(run):
    own, gpu = open_model(run), torch.device("cuda")
    low, high = (
        replace(own, recipe=own.recipe | {"training": {"precision": name}})
        for name in ("bf16-mixed", "fp32")
    )
    others = replace(own, recipe=None)
    assert precisions([others, high], gpu) == ["fp32", "fp32"]
    assert precisions([others, low, high], gpu) == ["bf16", "bf16", "fp32"]
    assert precisions([others, low], torch.device("cpu")) == ["fp32", "fp32"]
    assert precisions([others, low], gpu, "fp32") == ["fp32", "fp32"]


def test_a_number_is_asked_for_in_the_precision_asked_for(run):
    asked = {"lengths": [300], "depths": [0.5], "trials": 2}
    (exact,) = evaluate_retrieval(run, **asked)
    (close,) = evaluate_retrieval(run, **asked, precision="bf16")
    assert exact.provenance["precision"] == "fp32" and close.provenance["precision"] == "bf16"
    expected = exact.cells[0].log_probability
    assert close.cells[0].log_probability == pytest.approx(expected, rel=1e-2)
    assert close.cells[0].log_probability != expected
    with pytest.raises(UserError, match="unknown precision 'int8'"):
        evaluate_retrieval(run, **asked, precision="int8")


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_a_killed_retrieval_goes_on(run, killed):
    asked = {
        "tasks": ["passkey", "needle"],
        "lengths": [300, 400],
        "trials": 1,
        "depths": [0.0, 0.5, 0.0],
    }
    (expected, other) = evaluate_retrieval(run, **asked, out=run / "else")
    with pytest.raises(KeyboardInterrupt):
        evaluate_retrieval(run, **asked, watch=Heard(most=killed))
    heard = Heard()
    found = evaluate_retrieval(run, **asked, watch=heard)
    outcomes = [what for _, _, what in heard.lines]
    assert outcomes[:killed] == ["measured"] * killed and "measured" not in outcomes[killed:]
    assert heard.fed == heard.expected
    assert [each.cells for each in found] == [expected.cells, other.cells]
    assert expected.plan.depths == (0, 0.5), "each once"
    names = sorted(file.name for file in (run / "retrieval").iterdir())
    assert names == ["needle.json", "passkey.json"]


def test_a_retrieval_of_other_questions_is_made_anew(run):
    asked = {"lengths": [300], "trials": 1, "depths": [0.5]}
    evaluate_retrieval(run, **asked)
    for change in ({"seed": 1}, {"trials": 2}, {"depths": [0.25]}, {"again": True}):
        heard = Heard()
        evaluate_retrieval(run, **asked | change, watch=heard)
        assert [what for _, _, what in heard.lines] == ["exact"]


def test_a_needle_in_other_text_is_made_anew(run, tmp_path):
    asked = {"tasks": ["needle"], "lengths": [400], "trials": 1, "depths": [0.5]}
    outcomes = []
    for text in (None, None, prepare(tmp_path, seed=5)):
        (found,) = evaluate_retrieval(run, **asked, corpus=text, watch=(heard := Heard()))
        outcomes += [what for _, _, what in heard.lines]
    assert outcomes == ["exact", "measured", "exact"]
    assert found.data == Corpus(tmp_path / "data").checksum


def test_two_measurements_of_one_kind_are_one_too_many(run, corpus):
    folder = run / "evaluation"
    with locked(folder, "busy", "last"):
        with pytest.raises(UserError, match=f"another process is measuring {run}; wait"):
            evaluate(run, corpus, [16])
        evaluate(run, corpus, [16], "non_overlapping")
        evaluate(run, corpus, [16], out=run / "else")
    evaluate(run, corpus, [16])
    assert sorted(file.name for file in folder.iterdir()) == ["last.json", "non_overlapping.json"]


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"seed": 1.5}, {"documents": 0}, {"blocks": 1.5}, {"batch_tokens": 2**70}],
)
@pytest.mark.unhooked  # the hook that checks types would refuse some of them first
def test_numbers_that_mean_nothing_are_refused(run, corpus, wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name}="):
        evaluate(run, corpus, [16], **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": [1.5]}, "length=1.5"),
        ({"depths": [2]}, "depth=2 must be at most 1"),
        ({"depths": [math.nan]}, "depth=nan"),
        ({"trials": 0}, "trials=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
@pytest.mark.unhooked
def test_questions_that_mean_nothing_are_refused(run, wrong, message):
    with pytest.raises(UserError, match=message):
        evaluate_retrieval(run, **wrong)
