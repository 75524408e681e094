"""Masks with gaps, hidden tokens between visible ones: every row as if without hidden tokens.

Such masks come from prompt tuning beside left padding, and from conversations whose rows ended at
different times.
"""

import pytest
import torch
from models import fresh, grown, tokens
from peft import PromptTuningConfig, get_peft_model
from pretrained import bias_for, move, of_one_layer, pretrained
from torch.testing import assert_close
from transformers import DynamicCache

import dape
from dape.errors import UserError

MASK = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0, 1]])
SCHEMES = ["dape-kerple", "rope", "transformer-xl", "fire", "cope", "learned"]


def visible(ids, row):
    return ids[row : row + 1, MASK[row].bool()]


def near(ours, theirs, tolerance=1e-9):
    assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_hidden_tokens_are_as_if_left_out(scheme):
    model, ids = grown(scheme=scheme), tokens(2, 8)
    out, cache = model(ids, attention_mask=MASK).logits, DynamicCache(config=model.config)
    pieces = [
        model(ids[:, a:b], attention_mask=MASK[:, :b], past_key_values=cache).logits
        for a, b in ((0, 4), (4, 6), (6, 8))
    ]
    for row in range(2):
        alone = model(visible(ids, row)).logits[0]
        near(out[row, MASK[row].bool()], alone)
        near(torch.cat(pieces, 1)[row, MASK[row].bool()], alone)


@pytest.mark.parametrize("scheme", [*SCHEMES, "yarn", "xpos", "dynamic-ntk"])
@torch.no_grad()
def test_a_second_turn_with_padding_reads_the_cache_of_the_first(scheme):
    """Keys of the first turn, padded on the left alone, are turned by indices."""
    model, ids = grown(scheme=scheme), tokens(2, 8)
    model.lm_head.weight.data.mul_(5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1]])
    cache = DynamicCache(config=model.config)
    pieces = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 4), (4, 8))
    ]
    cache.crop(-4)  # the last four; newer transformers takes no length
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **how)
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        near(torch.cat(pieces, 1)[row, mask[row].bool()], model(alone).logits[0])
        expected = model.generate(alone, use_cache=False, **how)
        assert torch.equal(found[row, 8:], expected[0, alone.shape[1] :])


@pytest.mark.parametrize("fill", [0, 7])
@pytest.mark.parametrize("model", ["dape-kerple", "fire", "cope", "llama"])
@torch.no_grad()
def test_a_turn_may_begin_with_hidden_tokens_at_any_position(model, fill):
    """Callers fill positions of hidden tokens, and cached keys count back from visible ones."""
    if model == "llama":
        model = pretrained("llama", torch.float64)
        move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    else:
        model = grown(scheme=model)
    ids, mask = tokens(2, 9), torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1], [1] * 9])
    positions, cache = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill), DynamicCache()
    pieces = [
        model(
            ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b],
            past_key_values=cache,
        ).logits
        for a, b in ((0, 4), (4, 8), (8, 9))
    ]  # fmt: skip
    for row in range(2):
        alone = model(ids[row : row + 1, mask[row].bool()], use_cache=False).logits[0]
        near(torch.cat(pieces, 1)[row, mask[row].bool()], alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_as_if_hidden_tokens_were_left_out(cache):
    model, ids = grown(scheme="dape-kerple"), tokens(2, 8)
    model.lm_head.weight.data.mul_(5)

    def generate(ids, mask, **options):
        options |= {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, suppress_tokens=[0], **options)
        return out[:, ids.shape[1] :]

    found = generate(ids, MASK, cache_implementation=cache)
    for row in range(2):
        alone = visible(ids, row)
        expected = generate(alone, torch.ones_like(alone), use_cache=False)
        assert torch.equal(found[row], expected[0])


@torch.no_grad()
def test_tuned_prompts_stand_before_padding():
    model = fresh(scheme="dape-kerple")
    move(model, 0.2)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    move(tuned.prompt_encoder, 0.5)
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :4] = 0
    both = tuned.eval()(input_ids=ids, attention_mask=mask).logits
    alone = tuned(input_ids=ids[:1, 4:], attention_mask=mask[:1, 4:]).logits
    near(both[:1, -3:], alone[:, -3:], 1e-5)


@pytest.mark.parametrize("model", ["dape3-kerple", "llama"])
def test_convolutions_along_the_keys_refuse_gaps(model):
    if model == "llama":
        model = pretrained("llama")
        dape.retrofit(model, "dape3")
    else:
        model = fresh(scheme=model)
    of_each_query = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    of_each_query[:, :, 6:, 2:4] = False  # a tree of two branches behind one beginning
    for mask in (MASK, of_each_query):
        with pytest.raises(UserError, match="hides tokens between visible tokens") as error:
            model(tokens(2, 8), attention_mask=mask)
        assert "\n" not in str(error.value)
    model(tokens(2, 8), attention_mask=MASK.sort(-1).values)
    window = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril().triu(-2)
    model(tokens(2, 8), attention_mask=window)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi", "llama"])
@torch.no_grad()
def test_new_adapters_leave_a_model_unchanged_beside_gaps(name):
    """BLOOM and Falcon count visible tokens, and MPT counts hidden tokens too."""
    model, ids = pretrained(name), tokens(2, 8)
    expected = model(ids, attention_mask=MASK, use_cache=False).logits
    dape.retrofit(model, bias=bias_for(name))
    found = model(ids, attention_mask=MASK, use_cache=False).logits
    near(found[MASK.bool()], expected[MASK.bool()], 1e-5)


@pytest.mark.parametrize(
    "options", [{"bias": "kerple"}, {"bias": "fire"}, {"adapter": "transformer-xl"}]
)
@torch.no_grad()
def test_mounted_biases_read_the_positions_of_the_caller(options):
    """Tokens at positions apart are as among hidden tokens at the positions between."""
    model = pretrained("llama", torch.float64)
    move(dape.retrofit(model, **options).adapters, 0.3)
    ids, positions = tokens(2, 6), torch.tensor([0, 3, 4, 8, 9, 13])
    wide, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
    wide[:, positions], mask[:, positions] = ids, 1
    every = torch.arange(14)[None]
    expected = model(wide, attention_mask=mask, position_ids=every, use_cache=False).logits
    found = model(
        ids, attention_mask=torch.ones_like(ids), position_ids=positions[None], use_cache=False
    ).logits
    near(found, expected[:, positions])
    plain = model(ids, use_cache=False).logits
    assert (found - plain).abs().max() > 1e-3


@torch.no_grad()
def test_positions_that_only_begin_elsewhere_keep_a_relative_bias_without_a_batch_axis(monkeypatch):
    model, ids = pretrained("llama"), tokens(2, 6)
    dape.retrofit(model, bias="kerple")
    seen, kerple = [], dape.Kerple.forward

    def watched(self, query_positions, key_positions):
        seen.append(query_positions.ndim)
        return kerple(self, query_positions, key_positions)

    monkeypatch.setattr(dape.Kerple, "forward", watched)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0) + 5)
    assert set(seen) == {1}


@torch.no_grad()
def test_a_mask_of_four_axes_is_refused_where_positions_lie_apart_from_indices():
    model, ids = pretrained("llama", torch.float64), tokens(1, 6)
    move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    restarted, causal = (
        torch.tensor([[0, 1, 2, 0, 1, 2]]),
        torch.ones(6, 6, dtype=torch.bool).tril(),
    )
    number = torch.arange(6) // 3
    apart = (number[:, None] == number)[None, None] & causal
    found = model(ids, attention_mask=apart, position_ids=restarted, use_cache=False).logits
    near(found[:, 3:], model(ids[:, 3:], use_cache=False).logits)
    with pytest.raises(UserError, match="position_ids beside an attention_mask of four axes"):
        model(ids, attention_mask=causal[None, None], position_ids=restarted, use_cache=False)
    ids, positions, causal = tokens(1, 7), torch.tensor([[4, 5, 8]]), torch.ones(7, 7).tril().bool()
    causal[6, :6] = False  # the last token, three behind the one before, sees itself alone
    for mask in (causal, torch.ones_like(causal).tril()):
        cache = DynamicCache(config=model.config)
        model(ids[:, :4], past_key_values=cache)
        given = {"attention_mask": mask[None, None, 4:], "position_ids": positions}
        if mask is causal:
            found = model(ids[:, 4:], past_key_values=cache, **given).logits
            near(found[:, :2], model(ids[:, :6], use_cache=False).logits[:, 4:])
            near(found[:, 2:], model(ids[:, 6:], use_cache=False).logits)
        else:
            with pytest.raises(UserError, match="position_ids beside an attention_mask of four"):
                model(ids[:, 4:], past_key_values=cache, **given)


@torch.no_grad()
def test_a_part_that_is_a_model_reads_the_positions_of_the_caller():
    model, ids = pretrained("llama", torch.float64), tokens(2, 6)
    move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    given = {"position_ids": torch.tensor([[0, 3, 4, 8, 9, 13]]), "use_cache": False}
    given["attention_mask"] = torch.ones_like(ids)
    found = model.lm_head(model.model(ids, **given)[0])
    assert torch.equal(found, model(ids, **given).logits)


PADDED = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
APART = {"attention_mask": torch.ones_like(MASK), "position_ids": MASK.cumsum(-1) + MASK}
ENDS = torch.tensor([0, 3, 8])
WHOLE = MASK[:, None, None] & torch.ones(1, 1, 8, 8, dtype=torch.long).tril()


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("model", "options", "error"),
    [
        ("dape-kerple", {"attention_mask": MASK}, "a compiled model counts them: give position_id"),
        ("dape3-kerple", {"attention_mask": MASK}, "the adapter convolves over neighbouring keys"),
        ("dape3-kerple", {"attention_mask": WHOLE}, "the adapter convolves over neighbouring keys"),
        ("rope", {"token_type_ids": MASK}, "the model knows only token type 0"),
        ("llama", {"attention_mask": MASK}, "place tokens otherwise apart than indices"),
        ("rope", {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": 2 * ENDS}, "given, and be equal"),
        (
            "rope",
            {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS},
            "with the number of tokens at the end",
        ),
        ("llama", APART, "place tokens otherwise apart than indices"),
        ("gpt2", APART, "place tokens otherwise apart than indices"),
        ("llama", {**APART, "attention_mask": WHOLE.bool()}, "give an attention_mask .batch, keys"),
    ],
)
@torch.no_grad()
def test_compiled_code_refuses_at_run_time_what_it_would_compute_otherwise(model, options, error):
    """Positions and masks are read as eager code reads them, or refused, by the graph itself."""
    torch._dynamo.reset()
    backend = "aot_eager" if model == "dape-kerple" else "eager"  # which removes what is not used
    mounted = {"llama": {"bias": "kerple"}, "gpt2": {"adapter": "transformer-xl"}}
    if model in mounted:
        parts, model = mounted[model], of_one_layer(pretrained(model, torch.float64))
        move(dape.retrofit(model, **parts).adapters, 0.3)
    else:
        model = grown(scheme=model, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids, usual = tokens(2, 8), {"attention_mask": PADDED, "use_cache": False}
    if "token_type_ids" in options:
        usual["token_type_ids"] = torch.zeros_like(MASK)
    near(compiled(ids, **usual).logits[PADDED.bool()], model(ids, **usual).logits[PADDED.bool()])
    with pytest.raises(RuntimeError, match=error) as refused:
        compiled(ids, use_cache=False, **options)
    assert len(str(refused.value)) < 255 and "\n" not in str(refused.value)
