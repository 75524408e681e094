"""Documents packed in one row are computed as if alone, and masks of four axes as they are."""

import functools
import itertools
import re

import pytest
import torch
from models import SIZES, grown, tokens
from pretrained import GROUPED, move, pretrained
from test_blocks import llama, modern
from test_schemes import NAMES
from torch.testing import assert_close
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StaticCache,
)

import dape
from dape.errors import UserError

LENGTHS = (4, 1, 7)
WAYS = ["position_ids", "seq_idx", "cu_seq_lens"]
every_way = pytest.mark.parametrize("way", WAYS)
every_scheme = pytest.mark.parametrize("name", NAMES)


@functools.cache
def model_of(name):
    """Return a model that no test changes."""
    torch.manual_seed(0)
    return grown(scheme=name).requires_grad_(False)


def near(ours, theirs):
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def packed(way, documents):
    """Return a batch of one row as transformers' own collator packs it."""
    collate = DataCollatorWithFlattening(
        return_position_ids=way == "position_ids",
        return_seq_idx=way == "seq_idx",
        return_flash_attn_kwargs=way == "cu_seq_lens",
    )
    batch = collate([{"input_ids": ids} for ids in documents])
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    return batch


def documents():
    return [tokens(length) for length in LENGTHS]


@every_scheme
def test_each_document_has_the_logits_it_has_alone(name):
    model, texts = model_of(name), documents()
    expected = torch.cat([model(ids[None]).logits[0] for ids in texts])
    for way, use_cache in itertools.product(WAYS, (False, True)):
        near(model(**packed(way, texts), use_cache=use_cache).logits[0], expected)


@every_way
def test_loss_and_gradients_are_those_of_the_documents_alone(way):
    model, texts = grown(scheme="dape3-fire").train(), documents()
    batch = packed(way, texts)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    count = sum(LENGTHS) - len(LENGTHS)
    whole = model(**batch).loss
    alone = sum(
        model(ids[None], labels=ids[None], num_items_in_batch=torch.tensor(count)).loss
        for ids in texts
        if len(ids) > 1
    )
    assert_close(whole, alone, rtol=1e-6, atol=1e-6)  # the loss itself is float32
    for ours, theirs in zip(gradients(whole), gradients(alone), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_are_packed_each_in_its_own_way():
    model, ids = model_of("dape-kerple"), tokens(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    expected = torch.cat([model(ids[:1, :3]).logits, model(ids[:1, 3:]).logits], 1)
    for given in (
        {"position_ids": positions},
        {"seq_idx": torch.tensor([[3, 3, 3, 1, 1, 1], [0, 0, 0, 0, 0, 0]])},
        dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 3, 6, 12])),
    ):
        out = model(ids, **given).logits
        near(out[:1], expected)
        near(out[1:], model(ids[1:]).logits)
    once = model(ids, position_ids=positions[:1]).logits
    near(once[1:, 3:], model(ids[1:, 3:]).logits)


@pytest.mark.parametrize("name", ["dape-kerple", "dape3-fire", "rope"])
def test_a_number_that_returns_begins_a_document(name):
    model, ids = model_of(name), tokens(2, 9)
    number = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]]).expand(2, -1)
    expected = torch.cat([model(ids[:, at : at + 3]).logits for at in (0, 3, 6)], 1)
    near(model(ids, seq_idx=number).logits, expected)


def test_packing_is_that_of_transformers():
    theirs = llama(attn_implementation="eager")
    ours, batch = modern(theirs), packed("position_ids", documents())
    expected = theirs(**batch, use_cache=False)
    out = ours(**batch, use_cache=False)
    # Doubles both, so that the bound says that it is the same function.
    assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    theirs, ours = theirs.double(), ours.double()
    assert_close(ours(**batch).loss, theirs(**batch, use_cache=False).loss, rtol=1e-6, atol=1e-6)
    near_enough = (ours(**batch).logits - theirs(**batch, use_cache=False).logits).abs().max()
    assert near_enough < 1e-5  # Llama's angles are float32


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_packed_rows_go_through_a_cache_that_covers_their_positions(cache):
    """A document that goes on in the next piece is told by positions that cover the cached keys."""
    model, texts = model_of("dape3-fire"), documents()
    batch = packed("position_ids", texts)
    expected = model(**batch).logits
    kept = cache(model.config, max_cache_len=14) if cache is StaticCache else cache()
    pieces = [
        model(
            batch["input_ids"][:, piece],
            position_ids=batch["position_ids"][:, : piece.stop],
            past_key_values=kept,
        ).logits
        for piece in (slice(0, 3), slice(3, 8), slice(8, 9), slice(9, 12))
    ]
    near(torch.cat(pieces, 1), expected)


def test_padding_and_documents_hide_keys_together():
    model, ids = model_of("dape3-kerple"), tokens(1, 9)
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[:, :2] = 0
    number = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]])
    out = model(ids, attention_mask=mask, seq_idx=number).logits
    near(out[:, 2:5], model(ids[:, 2:5]).logits)
    near(out[:, 5:], model(ids[:, 5:]).logits)


@pytest.mark.parametrize("name", ["learned", "fire", "dape-kerple", "rope"])
def test_positions_given_beside_documents_are_those_of_the_caller(name):
    """Where positions jump, the document named by `seq_idx` goes on."""
    model, ids = model_of(name), tokens(1, 7)
    positions, number = torch.tensor([[0, 3, 4, 9, 1, 2, 8]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    found = model(ids, position_ids=positions, seq_idx=number).logits
    for part in (slice(0, 4), slice(4, 7)):
        given = {
            "position_ids": positions[:, part],
            "attention_mask": torch.ones_like(ids[:, part]),
        }
        near(found[:, part], model(ids[:, part], **given).logits)


@every_scheme
def test_documents_and_a_mask_of_four_axes_hide_keys_together(name):
    model, ids = model_of(name), tokens(1, 9)
    number = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    window = torch.ones(9, 9, dtype=torch.bool).tril().triu(-1)
    found = model(ids, seq_idx=number[None], attention_mask=window[None, None]).logits
    for part in (slice(0, 4), slice(4, 9)):
        alone = model(ids[:, part], attention_mask=window[None, None, part, part]).logits
        near(found[:, part], alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "modern"])
@torch.no_grad()
def test_beside_a_mask_of_four_axes_positions_count_hidden_tokens_as_in_transformers(name):
    base = llama() if name == "modern" else pretrained(name)
    base.set_attn_implementation("sdpa")  # eager adds a boolean mask to the scores
    ids, numbers = tokens(2, 9), torch.tensor([[0] * 4 + [1] * 5] * 2)
    shown = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    mask = (shown[:, None] & torch.ones(9, 9).bool().tril() | torch.eye(9).bool())[:, None]
    same = (numbers[:, :, None] == numbers[:, None, :])[:, None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    single = base(ids, attention_mask=mask, use_cache=False).logits
    several = base(ids, attention_mask=mask & same, position_ids=positions, use_cache=False).logits
    ours = base
    if name == "modern":
        ours = modern(base)
    else:
        dape.retrofit(base, "dape")
    alone = ours(ids, attention_mask=mask, use_cache=False).logits
    assert_close(alone, single, rtol=1e-5, atol=1e-5)
    found = ours(ids, attention_mask=mask, seq_idx=numbers, use_cache=False).logits
    assert_close(found, several, rtol=1e-5, atol=1e-5)


CONVOLVES = re.compile("dape[357]-")
HIDDEN = torch.tensor([[0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1]])
NUMBERS = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])


def pieces():
    """Return the row and the visible tokens of every document."""
    return [
        (row, (NUMBERS[row] == number) & HIDDEN[row].bool())
        for row in range(2)
        for number in NUMBERS[row].unique()
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if not CONVOLVES.match(name)])
def test_a_document_is_as_if_its_hidden_tokens_were_left_out(name):
    model, ids = model_of(name), tokens(2, 12)
    found = model(ids, attention_mask=HIDDEN, seq_idx=NUMBERS).logits
    for row, shown in pieces():
        near(found[row, shown], model(ids[row : row + 1, shown]).logits[0])


@pytest.mark.parametrize(
    ("name", "bias"), [("llama", "kerple"), ("llama", "fire"), ("gpt2", "kerple"), ("bloom", None)]
)
@torch.no_grad()
def test_mounted_biases_leave_out_the_hidden_tokens_of_a_document(name, bias):
    """BLOOM takes no positions and counts the visible tokens of the mask."""
    model, ids = pretrained(name, torch.float64), tokens(2, 12)
    mounted = dape.retrofit(model, bias=bias)
    move(mounted.adapters, 0.3)
    for each in mounted.attentions if bias == "fire" else ():
        each.position_bias.log_threshold.zero_()  # so that B depends on every position
    positions = torch.zeros_like(ids)
    for row, shown in pieces():
        positions[row, shown] = torch.arange(int(shown.sum()))
    own = {} if bias is None else {"position_ids": positions}
    found = model(ids, attention_mask=HIDDEN, seq_idx=NUMBERS, use_cache=False, **own).logits
    for row, shown in pieces():
        alone = model(ids[row : row + 1, shown], use_cache=False).logits[0]
        assert_close(found[row, shown], alone, rtol=1e-6, atol=1e-6)  # Llama's angles are float32


@pytest.mark.parametrize("bias", ["kerple", "fire"])
@torch.no_grad()
def test_mounted_biases_read_given_positions_of_documents(bias):
    """The positions of a document begin anywhere, and with numbers of documents step anyhow."""
    model, ids = pretrained("llama", torch.float64), tokens(1, 9)
    mounted = dape.retrofit(model, bias=bias)
    move(mounted.adapters, 0.3)
    for each in mounted.attentions if bias == "fire" else ():
        each.position_bias.log_threshold.zero_()
    starts, numbers = (
        torch.tensor([[7, 8, 9, 10, 2, 3, 4, 5, 6]]),
        torch.tensor([[0] * 4 + [1] * 5]),
    )
    ways = [(starts, {}), (starts, {"seq_idx": numbers})]
    ways += [(2 * starts, {"seq_idx": numbers, "attention_mask": torch.ones_like(ids)})]
    for positions, given in ways:
        found = model(ids, position_ids=positions, use_cache=False, **given).logits
        for part in (slice(0, 4), slice(4, 9)):
            own = {
                "position_ids": positions[:, part],
                "attention_mask": torch.ones_like(ids[:, part]),
            }
            alone = model(ids[:, part], use_cache=False, **own).logits
            assert_close(found[:, part], alone, rtol=1e-6, atol=1e-6)  # Llama's angles are float32
    mask = (numbers[:, :, None] >= numbers[:, None, :]).tril()[:, None]
    if bias == "kerple":
        found = model(
            ids, position_ids=starts, attention_mask=mask, seq_idx=numbers, use_cache=False
        )
        expected = model(ids, position_ids=starts, seq_idx=numbers, use_cache=False)
        assert_close(found.logits, expected.logits, rtol=1e-6, atol=1e-6)
        with pytest.raises(UserError, match="position_ids beside an attention_mask of four axes"):
            model(
                ids, position_ids=starts * 2, attention_mask=mask, seq_idx=numbers, use_cache=False
            )


RECURRENT = {
    "in the cache": lambda: Lfm2ForCausalLM(
        Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])
    ),
    "in the layers": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            **{**GROUPED, "hidden_size": 32},
            block_types=["recurrent", "attention"],
        )
    ),
}


@pytest.mark.parametrize("state", RECURRENT)
def test_recurrent_layers_would_join_the_documents_of_a_row(state):
    model = RECURRENT[state]().eval()
    dape.retrofit(model, bias="kerple")
    ids, numbers = tokens(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8])
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(2, -1)
    for given in ({"seq_idx": numbers}, {"position_ids": positions}):
        with pytest.raises(UserError, match=r"recurrent layers, .*: give each document a row"):
            model(ids, use_cache=False, **given)
    alone = model(ids, use_cache=False).logits
    whole = torch.tensor([0, 8, 16])  # a document a row
    packed = model(ids, use_cache=False, cu_seq_lens_q=whole, cu_seq_lens_k=whole).logits
    assert_close(packed, alone)


def test_chunks_of_attention_are_counted_over_the_documents_of_a_row():
    sizes = {**GROUPED, "intermediate_size_mlp": 20, "head_dim": 8, "attention_chunk_size": 8}
    config = Llama4TextConfig(**sizes, no_rope_layers=[1, 0], moe_layers=[])
    model = move(Llama4ForCausalLM(config).eval(), 0.1)
    move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    ids, positions = tokens(1, 9), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    documents = (ids[:, :3], ids[:, 3:8])
    expected = torch.cat([model(x, use_cache=False).logits for x in documents], dim=1)
    packed = model(ids[:, :8], position_ids=positions[:, :8], use_cache=False).logits
    assert_close(packed, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"within chunks of 8 tokens, .*: give each document a row"):
        model(ids, position_ids=positions, use_cache=False)
    model(ids, use_cache=False)  # a single document


def test_a_mask_of_ones_says_that_a_row_is_one_document():
    model, ids = model_of("dape-kerple"), tokens(1, 6)
    positions = torch.tensor([[0, 2, 4, 7, 8, 9]])
    out = model(ids, position_ids=positions, attention_mask=torch.ones(1, 6)).logits
    assert (out[:, 1:] - model(ids, position_ids=positions).logits[:, 1:]).abs().max() > 1e-3
    changed = ids.clone()
    changed[:, 0] = ids[:, 0] % (SIZES["vocab_size"] - 1) + 1
    other = model(changed, position_ids=positions, attention_mask=torch.ones(1, 6)).logits
    assert (other[:, 5] != out[:, 5]).any()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seq_idx": torch.zeros(2, 6)}, r"seq_idx \[2, 6\] must be \[2, 7\]"),
        ({"seq_idx": torch.zeros(1, 7)}, r"seq_idx \[1, 7\] must be \[2, 7\]"),
        ({"cu_seq_lens_k": torch.tensor([0, 14])}, "must both be given, and be equal"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 14]), "cu_seq_lens_k": torch.tensor([0, 7, 14])},
            "must both be given, and be equal",
        ),
        *(
            (dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds), "row of bounds with 14 at")
            for bounds in (torch.tensor([0, 21]), torch.tensor([[0, 14]]))
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 14])}, "must both be given, and be equal"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 14]), "cu_seq_lens_k": torch.tensor([0, 13])},
            "must both be given, and be equal",
        ),
        (
            dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 7])),
            "bounds with 14 at the end",
        ),
        ({"position_ids": torch.arange(6)[None]}, r"position_ids \[1, 6\] must be \[1 or 2, 7\]"),
        ({"position_ids": torch.arange(7)}, r"position_ids \[7\] must be \[1 or 2, 7\]"),
        ({"position_ids": torch.zeros(3, 7).long()}, r"position_ids \[3, 7\] must be"),
        ({"position_ids": torch.arange(7)[None] / 2}, r"position_ids \[1, 7\] are torch.float32"),
        ({"position_ids": torch.ones(1, 7).bool()}, r"position_ids \[1, 7\] are torch.bool"),
    ],
)
def test_documents_that_do_not_fit_are_refused(given, words):
    with pytest.raises(UserError, match=words) as error:
        model_of("dape-kerple")(tokens(2, 7), **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("static", [False, True])
def test_cached_keys_of_unknown_documents_are_refused(static):
    model, ids = model_of("dape-kerple"), tokens(1, 9)

    def new():
        return StaticCache(model.config, max_cache_len=12) if static else DynamicCache()

    cache = model(ids[:, :6], past_key_values=new()).past_key_values
    with pytest.raises(UserError, match="begin below the number of cached keys: give attention"):
        model(ids[:, 6:], position_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache)
    with pytest.raises(UserError, match="seq_idx and cu_seq_lens_q do not cover 6 cached keys"):
        model(ids[:, 6:], seq_idx=torch.zeros(1, 3).int(), past_key_values=cache)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    twice = torch.tensor([[0, 1, 2, 0, 1, 2]])
    cache = model(ids[:, :6], position_ids=twice, past_key_values=new()).past_key_values
    out = model(
        ids[:, 6:], position_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache,
        attention_mask=mask,
    )  # fmt: skip
    near(out.logits, model(ids[:, 3:]).logits[:, 3:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_mask_of_four_axes_is_taken_as_it_is(dtype):
    """A prefix whose tokens see each other, as in transformers."""
    theirs, ids = llama(attn_implementation="sdpa"), tokens(2, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[:3, :3] = True
    mask = mask.expand(2, 1, 7, 7)
    expected = theirs(ids, attention_mask=mask).logits
    causal = theirs(ids).logits
    assert (expected - causal)[:, :3].abs().max() > 0.1
    out = modern(theirs)(ids, attention_mask=mask.to(dtype)).logits
    assert_close(out, expected, rtol=1e-5, atol=1e-5)


@every_scheme
def test_a_token_of_a_prefix_sees_those_after_it(name):
    model, ids = model_of(name), tokens(1, 7)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    mask[..., :3, :3] = True
    changed = ids.clone()
    changed[:, 2] = ids[:, 2] % (SIZES["vocab_size"] - 1) + 1
    before, after = (model(x, attention_mask=mask).logits for x in (ids, changed))
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-6
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    near(model(ids, attention_mask=causal).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"head_mask": torch.ones(4)}, "unknown argument of the model 'head_mask'"),
        ({"lables": torch.ones(1, 5)}, "'lables'; did you mean 'labels'"),
        ({"token_type_ids": torch.arange(5)[None] // 3}, "token_type_ids: the model knows only to"),
        ({"output_router_logits": True}, "unknown argument of the model 'output_router_logits'"),
        ({"is_causal": False}, "unknown argument of the model 'is_causal'"),
        ({"cache_position": torch.arange(5)}, "unknown argument of the model 'cache_position'"),
        ({"encoder_hidden_states": torch.ones(1)}, "'encoder_hidden_states'"),
        pytest.param(
            {"attention_mask": {"full_attention": None}},
            "attention_mask is a dict; give a",
            marks=pytest.mark.unhooked,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_no_argument_is_dropped_in_silence(given, words):
    with pytest.raises(UserError, match=words) as error:
        model_of("dape-kerple")(tokens(1, 5), **given)
    assert "\n" not in str(error.value)


def test_arguments_that_change_nothing_are_taken():
    model, ids = model_of("dape-kerple"), tokens(1, 5)
    out = model(
        ids, head_mask=None, token_type_ids=torch.zeros_like(ids), is_causal=True,
        output_router_logits=False, return_dict=False, use_cache=False,
    )  # fmt: skip
    assert len(out) == 1 and torch.equal(out[0], model(ids).logits)
    states = model.model(ids, logits_to_keep=2).last_hidden_state
    assert torch.equal(model.lm_head(states), out[0])
