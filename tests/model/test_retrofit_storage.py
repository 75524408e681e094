"""Adapters in a folder, the parts that train with them, and what is refused in one line."""

import functools
import json

import pytest
import torch
from models import fresh
from pretrained import (
    GROUPED,
    NAMES,
    SIZES,
    bias_for,
    logits,
    move,
    of_one_layer,
    pretrained,
    tokens,
)
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextConfig,
    T5Config,
    T5ForConditionalGeneration,
    XmodConfig,
    XmodForCausalLM,
)

import dape
from dape.errors import UserError
from dape.model.retrofit import loading


@pytest.mark.parametrize("name", NAMES)
def test_saved_adapters_on_the_base_model_are_the_model(name, tmp_path):
    model, ids = pretrained(name), tokens(2, 12)
    base = set(model.state_dict())
    mounted = dape.retrofit(model, bias=bias_for(name))
    move(mounted.adapters, 0.3)
    mounted.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapters.safetensors", "adapters.json"}
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "adapters.safetensors").values())
    assert saved == sum(p.numel() for key, p in model.state_dict().items() if key not in base)
    other = pretrained(name)
    again = dape.load_adapters(other, tmp_path)
    assert {module.attention_backend for module in again.attentions} == {"auto"}
    assert torch.equal(logits(other, ids), logits(model, ids))
    again.unmount()
    assert torch.equal(logits(other, ids), logits(pretrained(name), ids))


def test_unmounted_adapters_are_not_saved_nor_those_mounted_since(tmp_path):
    model = pretrained("llama")
    mounted = dape.retrofit(model)
    mounted.unmount()
    again = None
    for _ in range(2):
        with pytest.raises(UserError, match="the adapters are unmounted; save or read adapters be"):
            mounted.save(tmp_path / "adapters")
        assert not (tmp_path / "adapters").exists()
        again = again or dape.retrofit(model)
    again.save(tmp_path / "adapters")


def test_parts_that_train_are_saved_loaded_and_put_back(tmp_path):
    model, ids = pretrained("llama"), tokens(2, 12)
    expected = logits(model, ids)
    mounted = dape.retrofit(model, bias="t5", train=["adapters", "input_layernorm", "lm_head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".adapter." not in name and "_bias." not in name} == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    mounted.save(tmp_path)
    other = pretrained("llama")
    handle = dape.load_adapters(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    for each, one in ((mounted, model), (handle, other)):
        each.unmount()
        assert torch.equal(logits(one, ids), expected)


def test_only_named_parts_train():
    model = pretrained("gpt2")
    dape.retrofit(model, train="ln_f")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }


def test_options_and_factories_survive_the_file(tmp_path):
    for number, (adapter, options) in enumerate(
        (
            ("dape3", {"adapter": {"hidden": 8}}),
            (functools.partial(dape.DAPE, kernel_size=3, hidden=8), None),
        )
    ):
        model, ids = pretrained("llama"), tokens(2, 12)
        mounted = dape.retrofit(model, adapter, dape.Kerple, options=options)
        move(mounted.adapters, 0.3)
        mounted.save(tmp_path / str(number))
        other = pretrained("llama")
        found = dape.load_adapters(other, tmp_path / str(number)).adapters[1]["adapter"]
        assert (found.hidden, found.kernel_size, found.residual) == (8, 3, False)
        assert torch.equal(logits(other, ids), logits(model, ids))


class Gate(nn.Module):
    """An adapter of a user's own: the scores times 1 + g, g = 0 at the start."""

    def __init__(self, num_heads):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_heads, 1, 1))

    def forward(self, scores, bias):
        return scores * (1 + self.gate)


def test_an_adapter_of_ones_own_is_given_again(tmp_path):
    model, ids = pretrained("llama"), tokens(2, 12)
    mounted = dape.retrofit(model, Gate)
    assert_close(logits(model, ids), logits(pretrained("llama"), ids), rtol=0, atol=1e-5)
    move(mounted.adapters, 0.3)
    mounted.save(tmp_path)
    other = pretrained("llama")
    with pytest.raises(UserError, match="is Gate, a class of your own: give adapter="):
        dape.load_adapters(other, tmp_path)
    dape.load_adapters(other, tmp_path, adapter=Gate)
    assert torch.equal(logits(other, ids), logits(model, ids))


class Twice(Gate):
    """With the tensors of the first, and other logits."""

    def forward(self, scores, bias):
        return scores * (1 + 2 * self.gate)


def test_another_class_with_the_same_tensors_is_refused(tmp_path):
    dape.retrofit(pretrained("llama"), Gate).save(tmp_path / "own")
    dape.retrofit(pretrained("llama"), "dape").save(tmp_path / "dape")
    for folder, given, words in (
        ("own", Twice, "own is Gate; give the class Gate"),
        ("dape", "dape3", "dape is dape; leave it out"),
        ("dape", functools.partial(dape.DAPE, hidden=8), "dape is dape; leave it out"),
    ):
        with pytest.raises(UserError, match=f"the adapter in .*{words}") as error:
            dape.load_adapters(pretrained("llama"), tmp_path / folder, adapter=given)
        assert "\n" not in str(error.value)


def test_an_interrupted_load_leaves_no_adapters(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    model, ids = pretrained("llama"), tokens(2, 12)
    dape.retrofit(pretrained("llama")).save(tmp_path)
    expected = logits(model, ids)
    monkeypatch.setattr(loading, "read_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dape.load_adapters(model, tmp_path)
    assert torch.equal(logits(model, ids), expected) and not hasattr(model, "retrofitted")


def forgetful(num_heads):
    Gate(num_heads)


class Loud(Gate):
    def forward(self, scores, bias):
        return scores * (1.5 + self.gate)


SMALL = {**GROUPED, "head_dim": 8}
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=24, num_heads=4, num_layers=1)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SIZES, intermediate_size=20)),
    "gpt-neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=61,
            hidden_size=24,
            num_layers=1,
            num_heads=4,
            attention_types=[[["global"], 1]],
        )
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    ),
    "minimax-m3": lambda: MiniMaxM3VLForCausalLM(
        MiniMaxM3VLTextConfig(
            **SMALL,
            layer_types=["full_attention", "minimax_m3_sparse"],
            mlp_layer_types=["dense", "dense"],
            dense_intermediate_size=20,
            index_n_heads=2,
            index_head_dim=8,
        )
    ),
    "glm-dsa": lambda: GlmMoeDsaForCausalLM(
        GlmMoeDsaConfig(
            **{**GROUPED, "num_key_value_heads": 4},
            q_lora_rank=8,
            kv_lora_rank=6,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=5,
            first_k_dense_replace=2,
            index_n_heads=2,
            index_head_dim=8,
        )
    ),
    "xmod": lambda: XmodForCausalLM(XmodConfig(**SIZES, intermediate_size=20, is_decoder=True)),
    "linear": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t5", "T5ForConditionalGeneration cannot be retrofitted: an encoder precedes"),
        ("bert", "BertSelfAttention cannot be retrofitted: attention is not causal"),
        (
            "gpt-neo",
            "GPTNeoForCausalLM cannot be retrofitted: the model's code computes attention outside",
        ),
        ("mamba", "MambaForCausalLM cannot be retrofitted: attention does not go through"),
        (
            "gpt-oss",
            r"GptOssAttention cannot be retrofitted: attention with attention sinks \(s_aux\)",
        ),
        (
            "minimax-m3",
            r"MiniMaxM3VLAttention cannot be retrofitted: attention with a further tensor "
            r"\(block_indices\)",
        ),
        ("glm-dsa", "GlmMoeDsaForCausalLM cannot .*, or reads the mask, as to choose keys"),
        (
            "xmod",
            "XmodForCausalLM cannot be retrofitted: a call with tokens alone ends in ValueError: "
            "Input language unknown",
        ),
        ("linear", "Linear cannot be retrofitted: not a PreTrainedModel"),
    ],
)
def test_a_model_that_cannot_be_served_is_told_why_and_left_alone(name, words):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        dape.retrofit(model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_cross_attention_is_refused_by_its_name_in_a_call_that_reaches_it():
    model, ids = GPT2LMHeadModel(GPT2Config(**SIZES, add_cross_attention=True)).eval(), tokens(1, 6)
    expected = logits(model, ids)
    dape.retrofit(model)
    assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="GPT2Attention has no adapter, as a cross-atten") as error:
        model(ids, encoder_hidden_states=torch.zeros(1, 3, 24))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llama", {"adapter": "dpae"}, "unknown adapter 'dpae'; did you mean 'dape'"),
        ("llama", {"bias": "kerpel"}, "unknown bias 'kerpel'; did you mean 'kerple'"),
        ("llama", {"bias": "rope"}, "unknown bias 'rope'"),
        (
            "llama",
            {"adapter": "dape3-kerple"},
            "adapter='dape3-kerple' is a whole scheme; give adapter='dape3', bias='kerple'",
        ),
        ("llama", {"adapter": "dape-rope"}, "is a whole scheme; give adapter='dape'$"),
        (
            "llama",
            {"adapter": functools.partial(dape.DAPE, 4, 64)},
            r"^adapter=functools.partial\(DAPE, 4, 64\): values need names",
        ),
        (
            "llama",
            {"bias": functools.partial(dape.FIRE, train_length=7)},
            r"^bias=functools.partial\(FIRE, train_length=7\): the model gives train_length",
        ),
        ("llama", {"adapter": dape.DAPE(4)}, r"adapter=DAPE\(...\) is a module, but layers"),
        ("llama", {"options": {"adapter": {"hiden": 3}}}, "'hiden'; did you mean 'hidden'"),
        ("llama", {"options": {"adaptor": {}}}, "'adaptor'; did you mean 'adapter'"),
        ("llama", {"options": {"bias": {}}}, "options.bias is set without a bias"),
        ("llama", {"train": "o_porj"}, "unknown part to train 'o_porj'; did you mean 'o_proj'"),
        ("llama", {"backend": "trition"}, "unknown backend 'trition'"),
        (
            "llama",
            {"adapter": "talking-heads", "bias": "kerple"},
            "TalkingHeads changes the logits before any training, .* or let bias be None",
        ),
        (
            "llama",
            {"bias": "kerple", "options": {"adapter": {"residual": True}}},
            "DAPE changes the logits before .* it must start as A, whatever the bias",
        ),
        ("llama", {"adapter": Loud}, "Loud changes the logits before any training"),
        (
            "bloom",
            {"bias": "kerple"},
            "bias='kerple': the model has ALiBi already, visible to the adapter",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(name, options, words):
    check_refused(pretrained(name), options, words)


@pytest.mark.unhooked  # the hook refuses values of other types first
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter": None}, "adapter=None is neither a name nor a class; known names: dape"),
        ({"bias": 5}, "bias=5 is neither a name nor a class; known names: alibi"),
        ({"adapter": forgetful}, "adapter=forgetful returned a NoneType; a factory returns a"),
        ({"bias": forgetful}, "bias=forgetful returned a NoneType; a factory returns a"),
        ({"options": 5}, "options=5 must map adapter and bias to options"),
        ({"options": {"bias": None}}, "options.bias=None must map option names to values"),
        ({"train": 5}, "train=5 must name parts, as 'adapters' or"),
        ({"train": [5]}, r"train=\[5\] must name parts"),
    ],
)
def test_arguments_of_another_type_are_one_line(options, words):
    check_refused(pretrained("llama"), options, words)


@pytest.mark.unhooked
def test_adapters_load_into_models_of_transformers_alone(tmp_path):
    dape.retrofit(pretrained("llama")).save(tmp_path)
    with pytest.raises(UserError, match="Linear cannot be retrofitted: not a PreTrainedModel"):
        dape.load_adapters(nn.Linear(2, 2), tmp_path)


def check_refused(model, options, words):
    ids = tokens(1, 8)
    expected = logits(model, ids)
    with pytest.raises(UserError, match=words) as error:
        dape.retrofit(model, **options)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model, ids), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_mounted_once():
    model = pretrained("llama")
    dape.retrofit(model)
    for once in (model, fresh(scheme="dape-kerple")):
        with pytest.raises(
            UserError, match=f"{type(once).__name__} has adapters already, of the scheme or mounted"
        ):
            dape.retrofit(once)


@pytest.mark.parametrize("factor", [1.01, 1.5])
def test_attention_that_does_more_than_it_says_is_refused(monkeypatch, factor):
    """The last resort: here a model that scales its queries where only its eager code can see."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward
    monkeypatch.setattr(
        modeling_llama,
        "eager_attention_forward",
        lambda module, query, *rest, **more: own(module, factor * query, *rest, **more),
    )
    with pytest.raises(
        UserError, match="with an adapter without effect the output of LlamaAttention"
    ):
        dape.retrofit(pretrained("llama"))


def test_folders_that_do_not_fit_are_one_line(tmp_path):
    dape.retrofit(pretrained("llama"), bias="kerple").save(tmp_path)
    ids, other = tokens(1, 8), LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 3}))
    expected = logits(other, ids)
    with pytest.raises(UserError, match=r"do not fit the model: 2.adapter.bias_in is missing"):
        dape.load_adapters(other, tmp_path)
    assert torch.equal(logits(other, ids), expected)
    with pytest.raises(UserError, match=r"1.adapter.bias_in is \[32\] in the folder, missing in"):
        dape.load_adapters(of_one_layer(pretrained("llama")), tmp_path)
    other = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_attention_heads": 2}))
    words = r"0.adapter.bias_out is \[4\] in the folder, \[2\] in the model"
    with pytest.raises(UserError, match=words):
        dape.load_adapters(other, tmp_path)
    with pytest.raises(
        UserError, match=r"are for a model of type 'llama' .* the model is of type 'gpt2'"
    ):
        dape.load_adapters(pretrained("gpt2"), tmp_path)
    dape.retrofit(pretrained("gemma")).save(tmp_path / "gemma")
    with pytest.raises(UserError, match=r"of type 'gemma' .* the model is of type 'gemma2'"):
        dape.load_adapters(pretrained("gemma2"), tmp_path / "gemma")
    for place, given in (("adapter", "talking-heads"), ("bias", dape.FIRE)):
        with pytest.raises(UserError, match=rf"the {place} in .* is (dape|kerple); leave it out"):
            dape.load_adapters(pretrained("llama"), tmp_path, **{place: given})
    dape.load_adapters(pretrained("llama"), tmp_path, adapter="dape", bias=dape.Kerple)
    with pytest.raises(UserError, match=r"no adapters in .*: adapters.json is missing"):
        dape.load_adapters(pretrained("llama"), tmp_path / "nowhere")
    settings = json.loads((tmp_path / "adapters.json").read_text())
    (tmp_path / "adapters.json").write_text(json.dumps({**settings, "format": 2}))
    with pytest.raises(UserError, match="not of format 1"):
        dape.load_adapters(pretrained("llama"), tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapters.json", lambda text: text[:9], "adapters.json is not JSON"),
        ("adapters.json", lambda text: text.replace(b'"kerple"', b"3"), "bias=3: expected text"),
        ("adapters.json", lambda text: text.replace(b"options", b"option"), "options is missing"),
        ("adapters.safetensors", lambda text: text[:9], "cannot read .*adapters.safetensors"),
        ("adapters.safetensors", lambda text: b"", "cannot read .*adapters.safetensors"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, damage, message):
    dape.retrofit(pretrained("llama"), bias="kerple").save(tmp_path)
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{message}.*save the adapters again"):
        dape.load_adapters(pretrained("llama"), tmp_path)


def test_options_replace_those_of_a_name_in_the_file_too(tmp_path):
    options = {"adapter": {"kernel_size": 5}, "bias": {"num_buckets": 6}}
    model, ids = pretrained("llama"), tokens(2, 12)
    mounted = dape.retrofit(model, "dape3", "t5", options=options)
    move(mounted.adapters, 0.3)
    mounted.save(tmp_path)
    other = pretrained("llama")
    handle = dape.load_adapters(other, tmp_path, backend="chunked")
    assert {module.attention_backend for module in handle.attentions} == {"chunked"}
    for each in (*mounted.adapters, *handle.adapters):
        assert each["adapter"].kernel_size == 5
        assert each["position_bias"].weight.numel() == 6 * 4
    assert_close(logits(other, ids), logits(model, ids), rtol=0, atol=1e-5)


class Endless(dape.ALiBi):
    """A bias without an end at distance 0, as a logarithm has."""

    def forward(self, query_positions, key_positions):
        return (-super().forward(query_positions, key_positions)).log()


def test_a_bias_that_is_not_finite_is_refused_before_any_training():
    model, ids = pretrained("llama"), tokens(1, 8)
    expected = logits(model, ids)
    with pytest.raises(UserError, match="with an adapter without effect the output of LlamaA"):
        dape.retrofit(model, bias=Endless)
    assert torch.equal(logits(model, ids), expected)
