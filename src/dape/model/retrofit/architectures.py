"""BLOOM, MPT and Falcon, with attention outside transformers' interface.

Attention modules get a `forward` that projects as the original does and then calls `attend`. The
code of the models stays unchanged. ALiBi becomes a bias, visible to adapters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from dape.model.retrofit.interface import LayerMask, attend
from dape.positions.bias import ALiBi, Bias


class FalconALiBi(Bias):
    r"""ALiBi in Falcon's arithmetic: `B_h = (a_h(j) - a_h(i)) / sqrt(d)`, `a_h(p) = s_h p`.

    a_h is rounded to bfloat16, and B is not a function of the distance alone.
    """

    relative = False

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads)
        self.head_dim = head_dim

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return the differences of the rounded products."""
        slopes = ALiBi(self.num_heads).slopes(query_positions.device).bfloat16()[:, None]
        query, key = (
            (slopes * x[..., None, :].bfloat16()).float() for x in (query_positions, key_positions)
        )
        return (key[..., None, :] - query[..., :, None]) / math.sqrt(self.head_dim)


def bloom(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: LayerMask,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the result of `BloomAttention.forward`."""
    from transformers.models.bloom.modeling_bloom import dropout_add

    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    out, weights = attend(
        self, query, key, value, attention_mask,
        dropout=self.attention_dropout.p if self.training else 0.0,
        output_attentions=output_attentions,
    )  # fmt: skip
    out = dropout_add(self.dense(out.flatten(2)), residual, self.hidden_dropout, self.training)
    return out, weights


def mpt(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: LayerMask | None = None,
    cache: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the result of `MptAttention.forward`, whose ALiBi counts hidden tokens too."""
    projected = self.Wqkv(hidden_states)
    if self.clip_qkv:
        projected = projected.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    heads = projected.unflatten(2, (3, self.n_heads, self.head_dim))
    query, key, value = heads.transpose(1, 3).unbind(2)
    cache = past_key_values if cache is None else cache
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    out, weights = attend(
        self, query, key, value, attention_mask, scaling=self.softmax_scale,
        dropout=self.attn_dropout_p if self.training else 0.0, by_index=True,
    )  # fmt: skip
    return self.out_proj(out.flatten(2)), weights


def falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: LayerMask,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the result of `FalconAttention.forward`."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    heads = self._split_heads(self.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in heads)
    if position_embeddings is not None and alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    out, weights = attend(
        self, query, key, value, attention_mask,
        dropout=self.attention_dropout.p if self.training and alibi is not None else 0.0,
        output_attentions=output_attentions,
    )  # fmt: skip
    return self.dense(out.flatten(2)), weights


@dataclass(frozen=True, slots=True)
class Architecture:
    """An attention class: a `forward`, the attribute with the number of heads, the model's bias."""

    forward: Callable[..., tuple[Tensor, Tensor | None]]
    heads: str
    bias: Callable[[Any], Bias | None]


def falcon_bias(module: Any) -> Bias | None:
    """Return the ALiBi of a Falcon with ALiBi and without rotary embedding, or None."""
    return FalconALiBi(module.num_heads, module.head_dim) if module.config.alibi else None


ARCHITECTURES = {
    "BloomAttention": Architecture(bloom, "num_heads", lambda module: ALiBi(module.num_heads)),
    "MptAttention": Architecture(mpt, "n_heads", lambda module: ALiBi(module.n_heads)),
    "FalconAttention": Architecture(falcon, "num_heads", falcon_bias),
}


def architecture_of(module: nn.Module) -> Architecture | None:
    """Return the entry of an attention module, or None for transformers' attention interface."""
    return ARCHITECTURES.get(type(module).__name__)
