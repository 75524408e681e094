import pytest
import torch
from small import recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dape import DapeConfig, DapeForCausalLM
from dape.train.estimate import GIB, flops_per_token, is_counted, memory, peak_flops, size
from dape.train.optimize import adamw
from dape.train.sections import Optimizer

H, C, LAYERS, V = 2, 16, 3, 50


def model(**changes):
    sizes = {"hidden_size": C, "num_hidden_layers": LAYERS, "num_attention_heads": H}
    return DapeForCausalLM(DapeConfig(vocab_size=V, backend="reference", **(sizes | changes)))


def test_parameters_by_hand():
    hidden = 5
    found = size(model(scheme_options={"adapter": {"hidden": hidden}}))
    matrices = LAYERS * (4 * C * C + 8 * C * C)
    biases_and_norms = LAYERS * (4 * C + 5 * C + 4 * C) + 2 * C
    positional = LAYERS * (2 * H + 2 * H * hidden + hidden + hidden * H + H)
    assert found.positional == positional
    assert found.multiplied == matrices + V * C
    assert found.parameters == matrices + biases_and_norms + 2 * V * C + positional


def test_a_tied_embedding_counts_once_and_is_multiplied():
    tied, untied = size(model(tie_word_embeddings=True)), size(model())
    assert untied.parameters - tied.parameters == V * C
    assert tied.multiplied == untied.multiplied


def test_the_paper_adds_14352_parameters():
    with torch.device("meta"):
        found = size(model(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
    assert found.positional == 14_352 + 12 * 2 * 12  # and Kerple's p and a


@pytest.mark.parametrize(
    "scheme", ["nope", "kerple", "dape-kerple", "dape-nope", "talking-heads-kerple"]
)
def test_arithmetic_is_what_torch_counts(scheme):
    module, length = model(scheme=scheme), 8
    tokens = torch.randint(V, (1, length))
    with FlopCounterMode(display=False) as counter:
        module(input_ids=tokens, labels=tokens).loss.backward()
    assert flops_per_token(module, length) * length == counter.get_total_flops()


@pytest.mark.parametrize("scheme", ["cope", "transformer-xl"])
def test_an_adapter_that_multiplies_queries_multiplies_by_token_as_torch_counts(scheme):
    module, length = model(scheme=scheme), 8
    tokens = torch.randint(V, (1, length))
    with FlopCounterMode(display=False) as counter:
        module(input_ids=tokens, labels=tokens).loss.backward()
    assert flops_per_token(module, length) * length == counter.get_total_flops()


SIZES = {
    "vocab_size": V, "hidden_size": C, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "angles"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**SIZES)), 0),
        (lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=C)), 0),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24, num_key_value_heads=1)), 12),
    ],
)
def test_tables_of_positions_multiply_nothing_and_heads_are_as_wide_as_they_are(build, angles):
    module, length = build(), 8
    module.config._attn_implementation = "eager"
    tokens = torch.randint(V, (1, length))
    with FlopCounterMode(display=False) as counter:
        module(input_ids=tokens, labels=tokens).loss.backward()
    assert is_counted(module)
    assert (flops_per_token(module, length) + 2 * angles) * length == counter.get_total_flops()


@pytest.mark.parametrize("config", [DeepseekV3Config(), Gemma3Config(), Gemma4TextConfig()])
def test_models_of_other_products_have_no_arithmetic(config):
    module = model()
    module.config = config
    assert not is_counted(module)


def test_a_mixture_of_experts_has_no_arithmetic():
    assert not is_counted(MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1)))


@pytest.mark.parametrize("trained", ["adapter", "gate_proj"])
def test_frozen_matrices_have_no_gradient_to_compute(trained):
    module, length = model(block="modern", scheme="dape-kerple"), 8
    parts = {"embed_tokens", "position_bias", "adapter", trained}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not parts.isdisjoint(name.split(".")))
    tokens = torch.randint(V, (1, length))
    with FlopCounterMode(display=False) as counter:
        module(input_ids=tokens, labels=tokens).loss.backward()
    assert flops_per_token(module, length) * length == counter.get_total_flops()


def test_the_states_take_what_their_tensors_take():
    module = model()
    optimizer = adamw(module, Optimizer())
    module(
        input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4).long()
    ).loss.backward()
    optimizer.step()
    held = [p for p in module.parameters()] + [p.grad for p in module.parameters()]
    held += [
        moment for state in optimizer.state.values() for moment in state.values() if moment.ndim
    ]
    found = sum(tensor.numel() * tensor.element_size() for tensor in held) / GIB
    settings = recipe("data", "out")
    parts = memory(settings, size(module).parameters, V, ranks=1)
    assert parts["weights, gradients, moments"] == pytest.approx(found)


def test_sharding_divides_the_states_and_checkpointing_shrinks_activations():
    copied = memory(recipe("data", "out"), 1000, V, ranks=2)
    sharded = memory(recipe("data", "out", hardware={"strategy": "fsdp"}), 1000, V, ranks=2)
    assert sharded["weights, gradients, moments"] == copied["weights, gradients, moments"] / 2
    again = {"activation_checkpointing": True, "micro_batch_size": 2}
    thrifty = memory(recipe("data", "out", hardware=again), 1000, V, ranks=2)
    assert thrifty["logits"] == copied["logits"] / 2
    assert thrifty["activations"] < copied["activations"] / 2


@pytest.mark.parametrize(("tokens", "held"), [(2**14, 2**14), (2**15, 2**15), (2**18, 2**15)])
def test_logits_take_the_memory_of_the_tokens_held_at_a_time(tokens, held):
    sizes = {"length": 2**10, "batch_size": tokens // 2**10, "precision": "bf16-mixed"}
    logits = memory(recipe("data", "out", training=sizes), 1000, V, ranks=1)["logits"]
    assert logits * GIB == held * V * (3 * 4 + 2)


@pytest.mark.parametrize(("precision", "wide"), [("bf16-mixed", 1), ("fp32", 2)])
def test_activations_are_those_of_the_layers_that_keep_them(precision, wide):
    """Of a token: 34 C bytes in a block; the input in float32; and six products of width C."""
    block, entry, products = 34 * wide * C, 4 * C, 6 * 2 * wide * C
    for checkpointing, kept in (
        ("none", 2 * block),
        ("blocks", block + 2 * entry),
        ("selective", block + 2 * (entry + products)),
    ):
        settings = recipe(
            "data", "out", training={"precision": precision},
            hardware={"activation_checkpointing": checkpointing},
        )  # fmt: skip
        for ranks in (1, 4):
            found = memory(settings, 1000, V, ranks)["activations"]
            assert found * GIB == pytest.approx(kept * 8 * 16 / ranks)


@pytest.mark.parametrize(("micro", "tokens"), [(None, 2 * 16), (1, 16 // 2)])
def test_devices_that_share_sequences_share_their_tokens(micro, tokens):
    """Eight sequences of 16 tokens on four devices, in two groups of two."""
    shared = {"context_parallel": 2, "micro_batch_size": micro}
    logits = memory(recipe("data", "out", hardware=shared), 1000, V, ranks=4)["logits"]
    assert logits * GIB == pytest.approx(tokens * V * 16)


@pytest.mark.parametrize(("gather", "whole"), [("pass", 0), ("step", 2 + 4)])
def test_weights_and_gradients_gathered_for_a_step_lie_whole_beside_the_shards(gather, whole):
    settings = recipe("data", "out", hardware={"strategy": "fsdp", "gather": gather})
    for ranks, held in ((1, 16), (2, 8 + whole), (8, 2 + whole)):
        found = memory(settings, 1000, V, ranks)["weights, gradients, moments"]
        assert found * GIB == pytest.approx(held * 1000)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (peak and peak * 1e12)
    assert peak_flops(torch.device("cpu")) is None
