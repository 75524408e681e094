"""The blocks of the language model: attention and feed-forward, with norms and residuals."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from dape.attention import attention
from dape.attention.context_parallel import ContextParallel
from dape.errors import UserError
from dape.model.arguments import check_counted
from dape.model.configuration import DapeConfig
from dape.positions import scheme
from dape.positions.rotary import Angles

INTO_STREAM = "into_stream"
# The attributes by which callers of a bias or adapter decide on arguments.
_READ = ("needs_rows", "reach", "relative")
_SAVED = ("adapter", "position_bias")


def residual_projection(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Return a linear layer into the residual stream, marked for the initialisation."""
    linear = nn.Linear(in_features, out_features, bias)
    setattr(linear, INTO_STREAM, True)
    return linear


def norm(config: DapeConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return the norm of the block's style over the residual stream."""
    kind = nn.RMSNorm if config.block == "modern" else nn.LayerNorm
    return kind(config.hidden_size, config.layer_norm_eps)


def in_use(part: Any) -> Any:
    """Return a module, or the copy that PEFT's `modules_to_save` trains in place of the module.

    Kernels recognise a bias or adapter by class. The layer that PEFT's `target_parameters` puts
    around a module gets the attributes that callers read.

    Raises:
        UserError: for a batch whose rows use different copies.
    """
    if hasattr(part, "base_layer"):
        base = in_use(part.base_layer)
        for name in _READ:
            if hasattr(base, name):
                setattr(part, name, getattr(base, name))
    if not hasattr(part, "modules_to_save"):
        return part
    copies = part.modules_to_save
    used = {name if name in copies else None for name in _names(part)}
    if len(used) > 1:
        raise UserError(
            f"adapter_names: the rows of a batch share the copies of {', '.join(_SAVED)} that PEFT "
            "trains; call the model once for each name"
        )
    (copy,) = used
    return part.original_module if copy is None else copies[copy]


def _names(part: Any) -> list[str | None]:
    """Return the active name of PEFT, or the names that a call gives for the rows of a batch."""
    for hook in reversed(part._forward_pre_hooks.values()):  # the last one decides
        if "adapter_names" in getattr(hook, "keywords", ()):
            return hook.keywords["adapter_names"]
    active = None if part.disable_adapters else part.active_adapters
    return [active[0] if active else None]


class DapeAttention(nn.Module):
    """Multi-head attention with the rotation, bias and adapter of the scheme."""

    def __init__(self, config: DapeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        width, kv_width, bias = config.hidden_size, config.key_value_size, config.has_biases
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, kv_width, bias)
        self.v_proj = nn.Linear(width, kv_width, bias)
        self.o_proj = residual_projection(width, width, bias)
        parts = scheme.resolve(config.scheme)
        dimensions, options = config.dimensions, config.scheme_options
        self.rotation = parts.build("rotation", dimensions, options)
        self.position_bias = parts.build("bias", dimensions, options)
        self.adapter = parts.build("adapter", dimensions, options)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        query_offset: int | Tensor = 0,
        causal: bool = True,
        cache: Cache | None = None,
        output_attentions: bool = False,
        context_parallel: ContextParallel | None = None,
        angles: Angles | None = None,
        keys: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed hidden states `[B, T, C]`, and the weights if asked for.

        `angles` are those of the rotation at the positions, if layers share them. `keys` is the
        number of keys that the cache counts.

        Raises:
            UserError: for a cache that holds other keys.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # [B, H, T, d]
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)  # [B, Hkv, T, d]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if angles is not None:
            query, key = angles.turn(query, key)
        elif self.rotation is not None:
            index = torch.arange(query.shape[2], device=query.device) + query_offset
            query, key = self.rotation(
                query, key, index if query_positions is None else query_positions
            )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            check_counted(key.shape[2], keys)
        operator: Any = attention
        if context_parallel is not None:  # with the positions of queries and keys
            operator, query_positions = context_parallel.attention, None
        out = operator(
            query,
            key,
            value,
            in_use(self.position_bias),
            in_use(self.adapter),
            causal and self.config.causal,
            query_offset=query_offset,
            backend=self.config.backend,
            mask=mask,
            query_positions=query_positions,
            key_positions=key_positions,
            return_weights=output_attentions,
        )
        out, weights = out if isinstance(out, tuple) else (out, None)
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights


class DapeMLP(nn.Module):
    """Feed-forward layer: `W2 gelu(W1 x)`, in the modern block `W2 (silu(Wg x) * W1 x)`."""

    def __init__(self, config: DapeConfig) -> None:
        super().__init__()
        width, wide, bias = config.hidden_size, config.feed_forward_size, config.has_biases
        self.gate_proj = nn.Linear(width, wide, bias) if config.block == "modern" else None
        self.up_proj = nn.Linear(width, wide, bias)
        self.down_proj = residual_projection(wide, width, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[B, T, C]` to `[B, T, C]`."""
        if self.gate_proj is None:
            return self.down_proj(gelu(self.up_proj(hidden_states)))
        return self.down_proj(silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DapeDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm block: attention, then feed-forward, both with a residual."""

    def __init__(self, config: DapeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = DapeAttention(config, layer_idx)
        self.post_attention_layernorm = norm(config)
        self.mlp = DapeMLP(config)

    def forward(self, hidden_states: Tensor, **where: Any) -> Tensor:
        """Map `[B, T, C]` to `[B, T, C]`; `where` holds mask, positions and cache."""
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **where)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
