"""Placement by Accelerate, and the text-generation pipeline."""

import pytest
import torch
from models import fresh, tokens
from transformers import AutoModelForCausalLM, pipeline

from dape.attention.select import BACKENDS
from dape.data.tokenizer import byte
from dape.errors import UserError

PIECES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
OFFLOADED = ("model.layers.1", "model.norm")


@pytest.mark.parametrize("scheme", ["dape-kerple", "dape3-fire", "transformer-xl"])
@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", {name: "disk" if name in OFFLOADED else "cpu" for name in PIECES}],
    ids=["cpu", "auto", "half of it on disk"],
)
def test_placed_models_compute_the_same(device_map, scheme, tmp_path):
    model, ids = fresh(scheme=scheme), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "weights"
    )
    on_meta = {name for name, weight in placed.named_parameters() if weight.is_meta}
    assert bool(on_meta) == isinstance(device_map, dict)
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, model(ids).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(placed.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("scheme", ["dape-kerple", "fire", "t5", "talking-heads-alibi"])
@torch.no_grad()
def test_fused_kernels_leave_offloaded_parameters_to_the_modules(scheme, monkeypatch, tmp_path):
    model, ids = fresh(scheme=scheme), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    expected = model(ids).logits
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", offload_folder=tmp_path / "weights",
        device_map={name: "disk" if "layers" in name else "cpu" for name in PIECES},
    )  # fmt: skip
    # As on a GPU, `auto` asks the fused kernels first.
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(gpu_only=False))
    assert torch.equal(placed(ids).logits, expected)
    placed.config.backend = "triton"
    with pytest.raises(UserError, match=r"a parameter of .* is on meta, and the query on cpu"):
        placed(ids)


@pytest.mark.parametrize("block", ["paper", "modern"])
def test_the_pipeline_continues_texts_as_generate_does(block, tmp_path):
    model, tokenizer = fresh(scheme="dape-kerple", vocab_size=257, block=block), byte()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts, options = ["a", "a longer text"], {"max_new_tokens": 6, "do_sample": False}
    generator = pipeline("text-generation", model=str(tmp_path))
    answers = generator(texts, batch_size=2, return_tensors=True, **options)
    for text, (answer,) in zip(texts, answers, strict=True):
        ids = torch.tensor([list(text.encode())])
        expected = model.generate(ids, **options, pad_token_id=256)[0, -6:].tolist()
        assert answer["generated_token_ids"][-6:] == expected
