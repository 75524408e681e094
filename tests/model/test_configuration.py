"""The configuration: what it refuses, and that it survives its file."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from dape.errors import UserError
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hiden_size": 64}, "'hiden_size'; did you mean 'hidden_size'"),
        (
            {"num_layers": 2},
            "unknown key of DapeConfig 'num_layers'; did you mean 'num_hidden_layers'",
        ),
        ({"max_position_embeddings": 64}, "unknown key of DapeConfig 'max_position_embeddings'"),
        ({"scheme": "dape-kerpel"}, "unknown scheme 'dape-kerpel'; did you mean 'dape-kerple'"),
        ({"scheme_options": {"adapter": {"hiden": 4}}}, "'hiden'; did you mean 'hidden'"),
        ({"scheme_options": {"adaptor": {}}}, "'adaptor'; did you mean 'adapter'"),
        ({"hidden_size": 100}, "hidden_size=100 is not a multiple of num_attention_heads=12"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 does not divide 12"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 does not divide 12"),
        ({"id2lable": {}}, "'id2lable'; did you mean 'id2label'"),
        ({"temperature": 0.5}, "unknown key of DapeConfig 'temperature'"),
        ({"block": "modren"}, "unknown block 'modren'; did you mean 'modern'"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"vocab_size": -1}, "vocab_size=-1 must be at least 1"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05 must be at least 0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps=nan"),
    ],
)
def test_mistakes_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        DapeConfig(**options)
    assert "\n" not in str(error.value)


def test_the_feed_forward_layer_has_the_documented_width():
    for width in range(1, 300, 13):
        modern = DapeConfig(hidden_size=width, num_attention_heads=1, block="modern")
        least = next(size for size in range(64, 10_000, 64) if 3 * size >= 8 * width)
        assert modern.feed_forward_size == least
        paper = DapeConfig(hidden_size=width, num_attention_heads=1)
        assert paper.feed_forward_size == 4 * width
    assert DapeConfig(num_key_value_heads=1).key_value_size == 64  # 768 / 12


def test_a_wrong_type_names_the_field():
    with pytest.raises(Exception, match=r"hidden_size[\s\S]*expected int"):
        DapeConfig(hidden_size="wide")


def test_every_field_survives_the_file(tmp_path):
    config = DapeConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, block="modern", intermediate_size=100, scheme="dape3-alibi",
        scheme_options={"adapter": {"hidden": 5, "residual": False}}, train_length=77,
        layer_norm_eps=1e-6, backend="reference", use_cache=False, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = DapeConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    for name in DapeConfig.__annotations__:
        assert getattr(loaded, name) == getattr(config, name), name


def test_what_transformers_writes_about_any_model_is_taken_back(tmp_path):
    """Whole or as the difference to its defaults, and through a dictionary."""
    config = DapeConfig(
        num_labels=3, problem_type="regression", dtype="bfloat16", architectures=["DapeModel"],
        output_hidden_states=True, output_attentions=True, name_or_path="here",
    )  # fmt: skip
    written = config.to_dict()
    assert written.keys() >= PreTrainedConfig().to_dict().keys()
    for use_diff in (True, False):
        config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
        loaded = DapeConfig.from_pretrained(tmp_path, name_or_path="here")
        assert loaded.to_dict() == written
    assert DapeConfig.from_dict(config.to_dict()).to_dict() == written
    assert DapeConfig(**config.to_dict()).to_dict() == written


def test_keys_that_other_tools_write_are_left_out_with_a_warning(tmp_path):
    model = DapeForCausalLM(DapeConfig(vocab_size=11, hidden_size=12, num_attention_heads=3))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "tool_version": "2.1", "pretraining_tp": 1}))
    words = "unknown to DapeConfig, without effect: pretraining_tp, tool_version"
    for load in (
        lambda: DapeConfig.from_pretrained(tmp_path),
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: DapeForCausalLM.from_pretrained(tmp_path).config,
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path).config,
    ):
        with pytest.warns(UserWarning, match=words):
            config = load()
        assert config.hidden_size == 12 and not hasattr(config, "tool_version")
    with pytest.warns(UserWarning, match=words):
        loaded = DapeForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    with pytest.raises(UserError, match="unknown key of DapeConfig 'pretraining_tp'"):
        DapeConfig(pretraining_tp=1)


def test_fields_set_later_are_checked_when_the_model_is_built():
    config = DapeConfig(hidden_size=32, num_attention_heads=4)
    config.num_attention_heads = 5
    with pytest.raises(UserError, match="hidden_size=32 is not a multiple"):
        DapeForCausalLM(config)


def test_sizes_left_out_follow_the_others():
    config = DapeConfig(hidden_size=96, num_attention_heads=6)
    assert (config.head_dim, config.feed_forward_size, config.key_value_size) == (16, 384, 96)
    shared = DapeConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    assert shared.key_value_size == 32
    assert config.num_key_value_heads == 6  # a number, as tools multiply by it
