"""The configuration of a DAPE language model, on Hugging Face conventions."""

import math
import shutil
import warnings
from dataclasses import field, fields
from pathlib import Path
from typing import Any, ClassVar, no_type_check

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from dape.attention.select import BACKENDS
from dape.errors import UserError, check_finite, check_switch, check_whole, unknown
from dape.model import announce
from dape.positions import scheme

BLOCKS = ("paper", "modern")
SHIM = Path(__file__).with_name("shim.py")
# The copy of the shim in a saved folder holds the classes for processes without `import dape`.
AUTO_MAP = {
    "AutoConfig": "modeling_dape.DapeConfig",
    "AutoModel": "modeling_dape.DapeModel",
    "AutoModelForCausalLM": "modeling_dape.DapeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_dape.DapeForSequenceClassification",
}

# Keys that transformers writes into a config.json or passes at load time.
_FOREIGN = frozenset(
    {
        "_commit_hash",
        "_experts_implementation_internal",
        "_attn_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
    }
)


@no_type_check  # by jaxtyping's hook, which knows only fields; `strict` checks the fields
@strict
class DapeConfig(PreTrainedConfig):
    """The configuration of a DAPE language model: sizes, block and scheme.

    Args:
        vocab_size: entries of the embedding.
        hidden_size: width C of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads H; `hidden_size / H` is the width of a head.
        num_key_value_heads: number of key and value heads, a divisor of H; H by default.
        block: `paper` (layer norm, GELU, biases) or `modern` (RMS norm, SwiGLU, no biases, as
            Llama).
        intermediate_size: width of the feed-forward layer, by default `4 * hidden_size`; in the
            modern block, with three matrices, 8/3 of `hidden_size`, up to a multiple of 64.
        scheme: the position encoding, such as `dape-kerple`; `dape info schemes` lists all.
        scheme_options: options by place (`embedding`, `rotation`, `bias`, `adapter`), such as
            `{"adapter": {"hidden": 32}}`.
        train_length: tokens of a training sequence, for schemes that depend on the training length;
            the model reads sequences of any length.
        causal: whether a token sees only earlier tokens; with False the model reads both ways, and
            the distance in every bias is |i - j|.
        layer_norm_eps: number added to the variance, or the mean square, in norms.
        backend: backend of attention, as in `dape.attention`.
        use_cache: whether a forward pass returns a cache of keys and values.
        tie_word_embeddings: whether input and output embedding share a matrix.
        bos_token_id: id of the token for the beginning of a text.
        eos_token_id: id of the token, or ids of the tokens, for the end of a text.
        pad_token_id: id of the token for padding.

    Raises:
        UserError: for an unknown key, block, scheme or option, or sizes not divisible by heads.

    """

    model_type = "dape"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    block: str = "paper"
    intermediate_size: int | None = None
    scheme: str = "dape-kerple"
    scheme_options: dict[str, Any] = field(default_factory=dict)
    train_length: int = 512
    causal: bool = True
    layer_norm_eps: float = 1e-5
    backend: str = "auto"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse impossible sizes, and unknown keys, which the base class would keep silently."""
        for name in kwargs:
            if name not in _FOREIGN:
                raise unknown("key of DapeConfig", name, [key.name for key in fields(self)])
        self.check()
        if self.num_key_value_heads is None:  # a number, for tools that read the configuration
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        announce.models()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of a file, without keys of other tools.

        A warning names foreign keys. The constructor refuses foreign keys.
        """
        known = _FOREIGN.union(key.name for key in fields(cls))
        if foreign := sorted(config_dict.keys() - known):
            warnings.warn(
                f"config.json has keys unknown to DapeConfig, without effect: {', '.join(foreign)}",
                stacklevel=2,
            )
        return super().from_dict(
            {name: value for name, value in config_dict.items() if name in known}, **kwargs
        )

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `config.json`, and the shim by which `trust_remote_code` finds `dape`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHIM, Path(save_directory) / "modeling_dape.py")
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing, because folders get the shim, where transformers would copy this file."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together."""
        return self.head_dim * (self.num_key_value_heads or self.num_attention_heads)

    @property
    def has_biases(self) -> bool:
        """Whether the linear layers add biases."""
        return self.block == "paper"

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layer."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        modern = 64 * math.ceil(self.hidden_size / 24)
        return modern if self.block == "modern" else 4 * self.hidden_size

    @property
    def dimensions(self) -> dict[str, int]:
        """The dimensions of the model, as arguments for modules of a scheme."""
        return {
            "num_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "train_length": self.train_length,
        }

    def check(self) -> None:
        """Check all values.

        Raises:
            UserError: for an impossible value, with the field and the remedy.
        """
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "train_length", "intermediate_size"):
            if getattr(self, name) is not None:
                check_whole(**{name: getattr(self, name)})
        check_finite(0, layer_norm_eps=self.layer_norm_eps)
        check_switch(causal=self.causal)
        if self.backend not in ("auto", *BACKENDS):
            raise unknown("backend", self.backend, ("auto", *BACKENDS))
        if self.block not in BLOCKS:
            raise unknown("block", self.block, BLOCKS)
        heads = self.num_attention_heads
        kv_heads = heads if self.num_key_value_heads is None else self.num_key_value_heads
        if self.hidden_size % heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}"
            )
        if kv_heads < 1 or heads % kv_heads:
            raise UserError(f"num_key_value_heads={kv_heads} does not divide {heads} query heads")
        scheme.check(self.scheme, self.scheme_options)


AutoConfig.register(DapeConfig.model_type, DapeConfig, exist_ok=True)
