"""Tiny models of transformers' own classes, whose weights are far from their start."""

import copy
import functools

import torch
from models import fresh
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

VOCABULARY, WINDOW = 61, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "intermediate_size": 20, "num_key_value_heads": 2}
# Six heads: ALiBi's slopes for a number that is no power of two.
SIX = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
SCALED = {"head_dim": 8, "query_pre_attn_scalar": 5}

BUILDERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=20)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, use_sliding_window=True, **WINDOWS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, **SCALED, **WINDOWS, attn_logit_softcapping=0.5)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, **SCALED, **WINDOWS)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=20, word_embed_proj_dim=24)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SIX, hidden_size=24, n_layer=2, n_head=6)),
    "mpt": lambda: MptForCausalLM(
        MptConfig(**SIX, d_model=24, n_layers=2, n_heads=6, max_seq_len=64)
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZES)),
    "falcon-grouped": lambda: FalconForCausalLM(
        FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True)
    ),
    "falcon-alibi": lambda: FalconForCausalLM(
        FalconConfig(**{**SIZES, "num_attention_heads": 6}, alibi=True, multi_query=False)
    ),
    "dape-rope": lambda: fresh(scheme="rope", vocab_size=VOCABULARY),
    "dape-alibi": lambda: fresh(scheme="alibi", vocab_size=VOCABULARY),
}
NAMES = list(BUILDERS)
ALIBI = {"bloom", "mpt", "falcon-alibi", "dape-alibi"}


@functools.cache
def _built(name):
    with torch.random.fork_rng(devices=()):  # a test draws the same whatever is built already
        torch.default_generator.manual_seed(0)
        return move(BUILDERS[name]().eval(), 0.1)


def pretrained(name, dtype=torch.float32):
    """Return a model that no other test holds, computing by its own code.

    That is the eager one, for PyTorch's has no cap of the scores; but Falcon's adds ALiBi twice.
    """
    model = copy.deepcopy(_built(name)).to(dtype)
    model.config._attn_implementation = "sdpa" if name.startswith("falcon") else "eager"
    return model


def of_one_layer(model):
    """Return a model without all layers but the first: a compiler traces each as it does that."""
    (layers,) = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    del layers[1:]
    model.config.num_hidden_layers = 1
    return model


def move(module, by):
    """Add noise to every parameter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return module


def bias_for(name):
    """Return a bias to add: none where the model has one."""
    return None if name in ALIBI else "kerple"


def tokens(*shape):
    """Return ids of no special token."""
    return torch.randint(1, VOCABULARY, shape)


def padded(rows=2, length=12):
    """Return ids and their mask, the first row padded on the left."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


def logits(model, ids, **kwargs):
    """Return the logits of a pass without cache and gradients."""
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits
