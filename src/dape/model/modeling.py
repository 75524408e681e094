"""A language model with position from a scheme alone.

- pre-norm decoder of norm, attention, norm and feed-forward; the paper's block has layer norms,
  GELU and biases, and the modern block has Llama's RMS norms, SwiGLU and no biases
- position enters at the four places of `dape.positions`; every layer has a separate bias and
  adapter, in float32
- attention by `dape.attention`, with grouped heads, cache and padding, at any length
- embedding and output layer are untied by default, with the paper's GPT-NeoX initialisation
"""

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dape.attention import attention
from dape.attention.context_parallel import ContextParallel
from dape.errors import UserError
from dape.model.arguments import packed_documents, refuse_unused
from dape.model.configuration import DapeConfig
from dape.model.masking import masking, part_of_sequence
from dape.positions import scheme
from dape.positions.rotary import RandomizedRoPE

INTO_STREAM = "into_stream"


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

    Kernels recognise a bias or adapter by class.
    """
    if not hasattr(part, "modules_to_save"):
        return part
    copies, active = part.modules_to_save, part.active_adapters
    used = not part.disable_adapters and bool(active) and active[0] in copies
    return copies[active[0]] if used else part.original_module


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
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        context_parallel: ContextParallel | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed hidden states `[B, T, C]`, and the weights if asked for."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # [B, H, T, d]
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)  # [B, Hkv, T, d]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.rotation is not None:
            index = torch.arange(query.shape[2], device=query.device) + query_offset
            query, key = self.rotation(
                query, key, index if query_positions is None else query_positions
            )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
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


class DapePreTrainedModel(PreTrainedModel):
    """The base of the models: names for loading, sharding and recording, and initialisation."""

    config: DapeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DapeDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
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

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Let `set_attn_implementation` call the method above, and raise the error."""
        return True


class DapeModel(DapePreTrainedModel):
    """The stack of blocks, from token ids `[B, T]` to hidden states `[B, T, C]`.

    Args:
        config: the configuration; `causal=False` reads both ways.

    Raises:
        UserError: for impossible values in the configuration.
    """

    def __init__(self, config: DapeConfig) -> None:
        super().__init__(config)
        config.check()  # fields may have changed since the constructor
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = scheme.resolve(config.scheme).build(
            "embedding", config.dimensions, config.scheme_options
        )
        self.layers = nn.ModuleList(
            DapeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states `[B, T, C]` and the cache.

        Args:
            input_ids: token ids `[B, T]`.
            attention_mask: 1 or true for visible tokens, `[B, Tk]` with the keys in the cache, or
                `[B, 1, T, Tk]` in place of the causal mask.
            position_ids: positions `[B, T]` or `[B, Tk]`; the number of earlier visible tokens by
                default.
            past_key_values: the cache of earlier keys and values.
            inputs_embeds: vectors `[B, T, C]` in place of `input_ids`.
            use_cache: whether to return a cache.
            output_attentions: whether to return softmax weights, from whole matrices.
            seq_idx: document number of each token, `[B, T]`, for packed rows.
            cu_seq_lens_q: bounds of the documents in a packed row.
            cu_seq_lens_k: equal to `cu_seq_lens_q`.
            kwargs: refused, unless without effect.

        Documents packed in a row are computed as if alone, with bounds from `seq_idx` or
        `cu_seq_lens_q`. Without either and without `attention_mask`, a document begins where
        `position_ids` do not increase by 1, as in transformers.

        With `context_parallel` the tokens are a device's part of sequences without padding, and all
        devices of the group call the model at once.

        Raises:
            UserError: for arguments that do not fit, or that the model would ignore.
        """
        refuse_unused(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch, length = hidden_states.shape[:2]
        documents = packed_documents(batch, length, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        given = (attention_mask, position_ids, past_key_values, documents)
        if context_parallel is None:
            where = masking(hidden_states, *given[:3], self.relative, documents)
        else:
            first = cast(DapeDecoderLayer, self.layers[0]).self_attn
            if self.training and isinstance(first.rotation, RandomizedRoPE):
                raise UserError(
                    "randomised positions need whole sequences; leave context_parallel out"
                )
            where = part_of_sequence(hidden_states, context_parallel, *given)
        if self.position_embedding is not None:
            positions = where["query_positions"]
            if positions is None:
                index = torch.arange(length, device=hidden_states.device)
                positions = index + where["query_offset"]
            hidden_states = self.position_embedding(hidden_states, positions)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                past_key_values=past_key_values,
                output_attentions=bool(output_attentions),
                **where,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    @property
    def relative(self) -> bool:
        """Whether every part of the scheme depends on differences of positions alone."""
        attention = cast(DapeDecoderLayer, self.layers[0]).self_attn
        parts = (self.position_embedding, attention.rotation, attention.position_bias)
        return all(part is None or bool(part.relative) for part in parts)


class DapeForCausalLM(DapePreTrainedModel, GenerationMixin):
    """A causal language model, from token ids `[B, T]` to logits `[B, T, V]` and loss.

    Args:
        config: the configuration, with `causal=True`.

    Raises:
        UserError: for a configuration with `causal=False`.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DapeConfig) -> None:
        super().__init__(config)
        if not config.causal:
            raise UserError(
                "causal=False: a causal language model would see the predicted tokens; take "
                "DapeModel to read both ways"
            )
        self.model = DapeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits `[B, T, V]`, and with `labels` the mean loss in nats a token.

        Args:
            input_ids: token ids `[B, T]`.
            attention_mask: as in `DapeModel.forward`.
            position_ids: as in `DapeModel.forward`.
            past_key_values: the cache of earlier keys and values.
            inputs_embeds: vectors `[B, T, C]` in place of `input_ids`.
            labels: token ids `[B, T]`, equal to `input_ids`; the method shifts labels by a token,
                and -100 is not scored.
            use_cache: whether to return a cache.
            logits_to_keep: number of last tokens with logits, or indices of tokens; 0 keeps all.
            kwargs: further arguments of `DapeModel.forward`.

        Raises:
            UserError: as `DapeModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """Derive no positions, because the model counts the visible tokens."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass on all positions, because a bias needs the positions of the cached keys too."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs if position_ids is None else {**inputs, "position_ids": position_ids}

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """Keep the padding mask; `dape.attention` adds causality, also for a static cache."""
        return attention_mask
