"""Small models of transformers with a tokenizer, and what `dape eval` writes beside them."""

import json

import torch
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
)

from folders import learned_tokenizer

ENDS = 16  # what each configuration says of the longest sequence
SHAPE = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
WIDE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NARROW = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": ENDS}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **WIDE, intermediate_size=32, max_position_embeddings=ENDS),
    "gpt_neox": GPTNeoXConfig(**SHAPE, **WIDE, intermediate_size=32, max_position_embeddings=ENDS),
    "gpt2": GPT2Config(**SHAPE, **NARROW),
    "opt": OPTConfig(
        **SHAPE,
        **WIDE,
        ffn_dim=32,
        word_embed_proj_dim=16,
        max_position_embeddings=ENDS,
        pad_token_id=1,
    ),
    "mpt": MptConfig(**SHAPE, d_model=16, n_heads=2, n_layers=1, max_seq_len=ENDS),
    "ctrl": CTRLConfig(**SHAPE, **NARROW, dff=32),
    "gptj": GPTJConfig(**SHAPE, **NARROW, rotary_dim=4),
}


def save(folder, names):
    """Save models with a tokenizer below a folder, and return the folder."""
    tokenizer = learned_tokenizer()
    for name in names:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def evaluation(folder):
    return json.loads((folder / "evaluation" / "last.json").read_text())
