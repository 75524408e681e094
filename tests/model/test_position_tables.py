"""Where models of transformers end, against the lengths at which the models themselves fail."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dape.errors import UserError
from dape.evaluate import evaluate
from dape.model.position_tables import Tables, check_reach
from folders import prepare

ENDS = 12
SMALL = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
NARROW = {"n_positions": ENDS, "n_embd": 16, "n_layer": 1, "n_head": 2}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "is_decoder": True,
}
PADDED = {**BERT, "max_position_embeddings": ENDS + 2, "pad_token_id": 1}
KINDS = {
    "ctrl": {**NARROW, "dff": 16},
    "gptj": {**NARROW, "rotary_dim": 4},
    "codegen": {**NARROW, "n_head": 4, "rotary_dim": 4},
    "openai-gpt": NARROW,
    "gpt2": NARROW,
    "mpt": {"max_seq_len": ENDS, "d_model": 16, "n_heads": 2, "n_layers": 1},
    "opt": {**PADDED, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": ENDS},
    "bert": {**BERT, "max_position_embeddings": ENDS},
    "roberta": PADDED,
    "camembert": PADDED,
    "data2vec-text": PADDED | {"max_position_embeddings": ENDS + 5, "pad_token_id": 4},
}


def make(kind, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def reads(model, length):
    """Return whether a model reads so many tokens, by itself."""
    tokens = torch.full((1, length), 7)
    try:
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=False).logits.isfinite().all().item()
    except (IndexError, RuntimeError):
        return False


def taken(call):
    """Return whether a call refuses nothing, in the words of a table of positions."""
    try:
        call()
    except UserError as error:
        assert "the table" in str(error)
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_refused_from_the_length_at_which_the_model_fails(kind):
    model = make(kind)
    for length in range(ENDS - 2, ENDS + 4):
        able = reads(model, length)
        assert able == (length <= ENDS)
        assert able == taken(lambda length=length: check_reach(model, length))
        for name in ("input_ids", "inputs_embeds"):
            tokens = torch.full((1, length), 7)
            given = tokens if name == "input_ids" else model.get_input_embeddings()(tokens)
            with Tables(model):
                assert able == taken(lambda given=given, name=name: model(**{name: given}))
        with Tables(model):
            assert able == taken(lambda length=length: model(torch.full((1, length), 7)))
    assert not reads(model, ENDS + 1) and not model._forward_pre_hooks, "the model is as before"


@pytest.mark.parametrize("kind", ["ctrl", "gptj"])
def test_a_generation_beyond_the_table_is_refused_at_the_token_beyond(kind):
    model, tokens = make(kind), torch.full((1, ENDS - 3), 7)
    for more, able in ((3, True), (4, True), (5, False)):  # the last token is not read
        with Tables(model):
            asked = {"max_new_tokens": more, "min_new_tokens": more, "pad_token_id": 0}
            assert able == taken(lambda asked=asked: model.generate(tokens, **asked))


@pytest.mark.parametrize(("kind", "key"), [("ctrl", "n_positions"), ("mpt", "max_seq_len")])
def test_a_model_in_memory_is_measured_as_far_as_its_table_and_the_remedy_reaches_further(
    tmp_path, kind, key
):
    data = prepare(tmp_path, sizes=[300, 400])
    (short,) = evaluate(make(kind, vocab_size=257), data, [8, 16], blocks=1)
    reason = f"the table of positions ends after {ENDS} tokens; load the model with {key}=16"
    assert short.refused == {16: reason} and [*short.by_length] == [8]
    (far,) = evaluate(make(kind, vocab_size=257, **{key: 16}), data, [8, 16], blocks=1)
    assert far.refused == {} and far.by_length[8] == short.by_length[8]
