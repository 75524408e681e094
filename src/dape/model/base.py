"""The base of the models: names for loading, sharding and recording, and initialisation."""

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from dape.errors import UserError
from dape.model.arguments import CACHE_NAMES
from dape.model.blocks import INTO_STREAM, DapeAttention, DapeDecoderLayer
from dape.model.configuration import DapeConfig


class DapePreTrainedModel(PreTrainedModel):
    """The base of `DapeModel`, `DapeForCausalLM` and `DapeForSequenceClassification`."""

    config: DapeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DapeDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = [*CACHE_NAMES]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "position_embedding",
        "position_bias",
        "adapter",
    ]
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": DapeDecoderLayer,
        "attentions": DapeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights as the paper's GPT-NeoX does, of width C and depth L.

        Standard deviation of matrices into the residual stream (`o_proj`, `down_proj`): 2 / (L
        sqrt(C)), `wang_init`; of further matrices: sqrt(2 / (5 C)), `small_init`. Biases 0, norms
        1. Modules of a scheme draw their parameters themselves.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            width, depth = self.config.hidden_size, self.config.num_hidden_layers
            small, wang = math.sqrt(2 / (5 * width)), 2 / (depth * math.sqrt(width))
            init.normal_(module.weight, std=wang if hasattr(module, INTO_STREAM) else small)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            init.ones_(module.weight)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
            return
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Return "eager", transformers' name for a model's own code; refuse other names."""
        if requested_attention not in (None, "eager"):
            raise UserError(
                f"attn_implementation={requested_attention!r}: DAPE models compute attention "
                f"by backend={self.config.backend!r} of the configuration; leave it out, or "
                "say 'eager'"
            )
        return "eager"

    def _check_and_adjust_attn_implementation(self, name: str | None, *_: Any, **__: Any) -> str:
        """Refuse a kernel of the hub too, which transformers would ask for first."""
        return self.get_correct_attn_implementation(name)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Let `set_attn_implementation` call the method above, and raise the error."""
        return True
