"""Random calls of compiled models against eager ones: the same numbers, or refused."""

import random

import pytest
import torch
from models import SIZES, grown
from pretrained import VOCABULARY, bias_for, move, pretrained
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import dape
from dape.errors import UserError

pytestmark = pytest.mark.unhooked
SCHEMES = ["rope", "yarn", "xpos", "fire", "cope", "t5", "dape-kerple", "dape3-kerple"]
NAMES = ["llama", "mistral", "gemma2", "gpt2", "opt", "qwen3", "mpt", "falcon-alibi"]
MOUNTED = [
    *(("dape", "kerple"), ("dape", None), ("dape3", "kerple"), ("talking-heads", "kerple")),
    *(("transformer-xl", None), ("cope", None)),
]
# What compiled code refuses alone: eager code looks at the numbers, and places tokens by them.
ALONE = ("a compiled model counts them", "otherwise apart than indices")


def drawn_model(draw):
    """Return a model and the number of its tokens."""
    if draw.random() < 0.5:
        return grown(scheme=draw.choice(SCHEMES), num_hidden_layers=1), SIZES["vocab_size"]
    name = draw.choice(NAMES)
    model, (adapter, bias) = pretrained(name, torch.float64), draw.choice(MOUNTED)
    move(dape.retrofit(model, adapter, bias_for(name) and bias).adapters.double(), 0.3)
    return model, VOCABULARY


def drawn_mask(draw, batch, rows, keys):
    """Return no mask, padding on a side, holes, or a mask of four axes."""
    kind = draw.choice(["none", "none", "left", "right", "holes", "four"])
    mask, some = torch.ones(batch, keys, dtype=torch.long), draw.randint(0, keys - 2)
    if kind == "left":
        mask[0, :some] = 0
    elif kind == "right":
        mask[0, keys - some :] = 0
    elif kind == "holes":
        mask[:, 1:-1] = torch.randint(2, (batch, keys - 2))
    elif kind == "four":
        mask = torch.ones(1, 1, keys, keys, dtype=torch.bool).tril()[:, :, keys - rows :]
        mask[..., :some] = True
    return {} if kind == "none" else {"attention_mask": mask}


def drawn_positions(draw, rows, past):
    """Return no positions, those of the tokens, later ones, some apart, or some that restart."""
    kind = draw.choice(["none", "none", "later", "apart", "restart"])
    index = torch.arange(rows)[None] + past
    if kind == "later":
        index = index + draw.randint(0, 5)
    elif kind == "apart":
        index = index + torch.randint(2, (1, rows)).cumsum(-1)
    elif kind == "restart":
        index[:, draw.randint(1, rows - 1) :] -= draw.randint(1, rows)
    return {} if kind == "none" else {"position_ids": index.clamp(min=0)}


def logits(called, model, ids, given, past, cache):
    """Return logits of the last tokens, behind a cache of the tokens before; or the refusal."""
    kept = {"use_cache": False}
    if cache:
        made = cache(model.config, max_cache_len=16) if cache is StaticCache else cache()
        kept = {"past_key_values": made}
    if past:
        mask = given.get("attention_mask")
        before = {} if mask is None or mask.ndim == 4 else {"attention_mask": mask[:, :past]}
        model(ids[:, :past], **kept, **before)
    try:
        return called(ids[:, past:], **kept, **given).logits, None
    except (UserError, RuntimeError) as error:
        return None, str(error)


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_compiled_models_compute_what_eager_ones_do_or_refuse(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model, entries = drawn_model(draw)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        batch, rows = draw.randint(1, 3), draw.randint(2, 8)
        cache = draw.choice([None, None, DynamicCache, StaticCache])
        past = draw.choice([0, 3]) if cache else 0
        given = drawn_mask(draw, batch, rows, past + rows) | drawn_positions(draw, rows, past)
        ids = torch.randint(1, entries, (batch, past + rows))
        (ours, refusal), (theirs, error) = (
            logits(called, model, ids, given, past, cache) for called in (compiled, model)
        )
        if theirs is None:
            assert ours is None, error
        elif ours is None:
            assert any(text in refusal for text in ALONE), refusal
        else:
            mask = given.get("attention_mask")
            seen = mask if mask is not None and mask.ndim == 2 else torch.ones(batch, past + rows)
            seen = seen[:, past:].bool()
            assert_close(ours[seen], theirs[seen], rtol=1e-6, atol=1e-6)
