"""Sequence classification: scores read at the last token, by whichever side the padding is."""

import numpy as np
import pytest
import torch
from models import SIZES, tokens
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from dape.errors import UserError
from dape.model.configuration import DapeConfig
from dape.model.huggingface import DapeForSequenceClassification


@pytest.fixture(params=["paper", "modern"])
def model(request):
    config = DapeConfig(
        **SIZES, scheme="dape-kerple", block=request.param, num_labels=3, pad_token_id=0
    )
    return DapeForSequenceClassification(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_the_last_token_of_each_row_alone(model, side):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    padding = slice(0, 4) if side == "left" else slice(5, 9)
    ids[0, padding], mask[0, padding] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    short = ids[:1, 4:] if side == "left" else ids[:1, :5]
    for row, alone in enumerate((short, ids[1:])):
        assert_close(logits[row : row + 1], model(alone).logits, rtol=1e-5, atol=1e-6)
        hidden = model.model(alone).last_hidden_state[:, -1]
        assert_close(model(alone).logits, hidden @ model.score.weight.T)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@torch.no_grad()
def test_a_mask_says_which_token_is_the_last(model, side, given):
    """Whatever the tokens of the padding, and whether the last visible token is that of padding."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    ids[1, 8] = model.config.pad_token_id
    inputs = ids if given == "input_ids" else model.model.embed_tokens(ids)
    found = model(**{given: inputs}, attention_mask=mask).logits
    for row in range(2):
        alone = model.model(ids[row : row + 1, mask[row].bool()]).last_hidden_state[0, -1]
        assert_close(found[row], model.score.weight @ alone, rtol=1e-5, atol=1e-6)
    first = model.model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    rest = {given: inputs[:, 6:], "past_key_values": first}
    if side == "left":
        assert_close(model(**rest, attention_mask=mask).logits, found, rtol=1e-5, atol=1e-6)


def test_a_batch_of_unknown_padding_is_refused(model):
    model.config.pad_token_id = None
    ids = tokens(2, 9)
    with pytest.raises(UserError, match=r"^pad_token_id=None.*: give attention_mask \[") as error:
        model(ids)
    assert "\n" not in str(error.value)
    both = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert_close(both[:1], model(ids[:1]).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_row_without_a_known_last_token_is_refused(model):
    """The score would be that of a hidden token, or of padding."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    embedded = model.model.embed_tokens(ids)
    with pytest.raises(UserError, match=r"^inputs_embeds, and any of the 2 rows.* give attention"):
        model(inputs_embeds=embedded)
    alone = model(inputs_embeds=embedded[:1]).logits
    assert_close(alone, model(ids[:1]).logits, rtol=1e-5, atol=1e-6)
    first = model.model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    hidden = {"attention_mask": mask, "past_key_values": first}
    for given in ({"input_ids": ids[:, 6:], **hidden}, {"input_ids": 0 * ids}):
        with pytest.raises(UserError, match="a row has no last token") as error:
            model(**given)
        assert "\n" not in str(error.value)


def test_the_loss_is_the_cross_entropy_of_the_labels(model):
    ids, labels = tokens(4, 9), torch.tensor([0, 2, 1, 2])
    out = model(ids, labels=labels)
    logits = out.logits.detach().double().numpy()
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(4), labels]
    assert out.loss.item() == pytest.approx(losses.mean(), rel=1e-5)
    out.loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_a_head_starts_on_the_stack_of_a_language_model(model, tmp_path):
    from dape.model.modeling import DapeForCausalLM

    language = DapeForCausalLM(DapeConfig(**SIZES, scheme="dape-kerple"))
    language.save_pretrained(tmp_path)
    loaded = DapeForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, problem_type="multi_label_classification"
    )
    ids = tokens(1, 9)
    hidden = language.eval().model(ids).last_hidden_state
    assert torch.equal(loaded.model(ids).last_hidden_state, hidden)
    assert loaded(ids, labels=torch.ones(1, 5)).loss.isfinite() and loaded.score.out_features == 5


def test_the_trainer_averages_the_loss_over_accumulated_batches(model, tmp_path):
    rows = [{"input_ids": ids, "labels": each % 3} for each, ids in enumerate(tokens(4, 9))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.0, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    logits = torch.cat([model(row["input_ids"][None]).logits for row in rows])
    expected = cross_entropy(logits, torch.tensor([row["labels"] for row in rows])).item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
