"""A language model with position from a scheme alone.

- pre-norm decoder of norm, attention, norm and feed-forward; the paper's block has layer norms,
  GELU and biases, and the modern block has Llama's RMS norms, SwiGLU and no biases
- position enters at the four places of `dape.positions`; every layer has a separate bias and
  adapter, in float32
- attention by `dape.attention`, with grouped heads, cache and padding, at any length
- embedding and output layer are untied by default, with the paper's GPT-NeoX initialisation
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dape.attention.context_parallel import ContextParallel
from dape.errors import UserError, check_whole
from dape.model.arguments import (
    CACHE,
    by_either_name,
    check_goes_on,
    check_last,
    packed_documents,
    refuse_pages,
    refuse_unused,
)
from dape.model.base import DapePreTrainedModel
from dape.model.blocks import DapeDecoderLayer, in_use, norm
from dape.model.configuration import DapeConfig
from dape.model.masking import mask_of_generation, masking, part_of_sequence, positions_of_gaps
from dape.positions import scheme
from dape.positions.absolute import Learned
from dape.positions.rotary import Angles, RandomizedRoPE, angles_of

DRAWS = "randomised positions need whole sequences in training; "


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
        for layer in cast(Iterable[DapeDecoderLayer], self.layers):
            layer.self_attn.rotation = self.rotation  # which has no parameters
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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states `[B, T, C]` and the cache.

        Args:
            input_ids: token ids `[B, T]`.
            attention_mask: 1 or true for visible tokens, `[B, Tk]` with the keys in the cache, or
                `[B, 1, T, Tk]` in place of the causal mask. Positions then count hidden tokens, as
                in transformers.
            position_ids: positions `[B, T]` or `[B, Tk]`; the number of earlier visible tokens by
                default, up to a constant where only distances count. A rotation stores turned keys
                in a cache, so give `position_ids` in every call with the cache or in none. A
                compiled model needs `position_ids` for a mask that hides tokens between visible
                tokens.
            past_key_values: the cache of earlier keys and values.
            inputs_embeds: vectors `[B, T, C]` in place of `input_ids`.
            use_cache: whether to return a cache.
            output_attentions: whether to return softmax weights, from whole matrices.
            seq_idx: document number of each token, `[B, T]`, for packed rows; where the number
                changes, a document begins.
            cu_seq_lens_q: bounds of the documents in a packed row.
            cu_seq_lens_k: equal to `cu_seq_lens_q`.
            cache: newer name of `past_key_values`.
            kwargs: refused, unless without effect.

        Documents packed in a row are computed as if alone, with bounds from `seq_idx` or
        `cu_seq_lens_q`. Without either and without `attention_mask`, a document begins where
        `position_ids` do not increase by 1, as in transformers.

        With `context_parallel` the tokens are a device's part of sequences without padding, and all
        devices of the group call the model at once.

        Raises:
            UserError: for arguments that do not fit, or that the model would ignore.
        """
        refuse_unused(kwargs, self.config.causal)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        cache = self._cache(by_either_name(past_key_values, cache), use_cache)
        batch, length = hidden_states.shape[:2]
        documents = packed_documents(batch, length, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        given = (attention_mask, position_ids, cache, documents)
        if context_parallel is None:
            where = masking(hidden_states, *given, relative=self.relative, reach=self.reach)
        else:
            if self.draws:
                raise UserError(DRAWS + "leave context_parallel out")
            where = part_of_sequence(hidden_states, context_parallel, *given)
        hidden_states, angles = self._placed(hidden_states, where)
        layers = self.layers[: self.config.num_hidden_layers]  # fewer in an early exit
        for layer in cast(Iterable[DapeDecoderLayer], layers):
            hidden_states = layer(
                hidden_states,
                cache=cache,
                output_attentions=bool(output_attentions),
                angles=angles if layer.self_attn.rotation is self.rotation else None,
                **where,
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), cache)

    def _placed(self, embedded: Tensor, where: dict[str, Any]) -> tuple[Tensor, Angles | None]:
        """Return vectors with an embedding of positions, and the angles that layers share."""
        if self.position_embedding is None and self.rotation is None:
            return embedded, None
        positions = where["query_positions"]
        if positions is None:
            index = torch.arange(embedded.shape[1], device=embedded.device)
            positions = index + where["query_offset"]
        if self.position_embedding is not None:
            _check_everywhere(self.position_embedding, embedded, where.get("context_parallel"))
            embedded = self.position_embedding(embedded, positions)
        return embedded, angles_of(self.rotation, positions, embedded.dtype)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the given cache, or a new cache if `use_cache` asks for one."""
        if given is not None and self.recomputes:
            raise UserError(
                "gradient checkpointing computes each layer twice, and a cache keeps the keys of "
                "both: leave out past_key_values, or say gradient_checkpointing_disable()"
            )
        if given is not None and not self.config.causal:
            raise UserError(
                "causal=False: earlier tokens see later ones, and a cache keeps keys that do not; "
                "leave past_key_values out"
            )
        if given is not None and any(given.is_sliding):
            raise UserError(
                "past_key_values drops the keys before a sliding window, and the model reads all "
                "keys: give a cache of this model, such as DynamicCache(config=model.config)"
            )
        if given is not None and self.draws and int(given.get_seq_length()):
            raise UserError(DRAWS + "leave past_key_values out, or call model.eval()")
        return DynamicCache(config=self.config) if use_cache and given is None else given

    @property
    def rotation(self) -> Any:
        """The rotation of the first layer, or None; all layers of a new model have the same."""
        return cast(DapeDecoderLayer, self.layers[0]).self_attn.rotation

    @property
    def draws(self) -> bool:
        """Whether positions of this forward pass are drawn at random."""
        return self.training and isinstance(self.rotation, RandomizedRoPE)

    @property
    def recomputes(self) -> bool:
        """Whether gradient checkpointing computes the layers of this forward pass again."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    @property
    def relative(self) -> bool:
        """Whether every part of the scheme depends on differences of positions alone."""
        attention = cast(DapeDecoderLayer, self.layers[0]).self_attn
        parts = (self.position_embedding, self.rotation, in_use(attention.position_bias))
        return all(part is None or bool(part.relative) for part in parts)

    @property
    def reach(self) -> int:
        """Number of keys to each side on which a logit depends through the adapter's taps."""
        attention = cast(DapeDecoderLayer, self.layers[0]).self_attn
        return getattr(in_use(attention.adapter), "reach", 0)


def _check_everywhere(embedding: Any, part: Tensor, spread: ContextParallel | None) -> None:
    """Raise the `UserError` for a position of a shared sequence on all devices.

    A device that refuses alone leaves the others waiting for keys.
    """
    if spread is not None and isinstance(embedding, Learned):
        positions = spread.all_positions(part.shape[1], part.device)
        embedding.check(len(positions) if spread.end is None else spread.end, positions)


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
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
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
            seq_idx: document number of each token; by this name `Trainer` keeps a column.
            cache: newer name of `past_key_values`.
            kwargs: further arguments of `DapeModel.forward`.

        Raises:
            UserError: as `DapeModel.forward`, for `labels` with `logits_to_keep`, and for a
                negative `logits_to_keep`.
        """
        if isinstance(logits_to_keep, int):
            check_whole(0, logits_to_keep=logits_to_keep)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise UserError("labels need the logits of all tokens: leave logits_to_keep out")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        cache = getattr(outputs, CACHE)
        return CausalLMOutputWithPast(
            loss, logits, cache, outputs.hidden_states, outputs.attentions
        )

    def _prepare_position_ids_for_generation(
        self, _: Tensor, model_kwargs: Mapping[str, Any]
    ) -> None:
        """Derive no positions, because the model counts the visible tokens.

        Raises:
            UserError: for prompts that end in hidden tokens.
        """
        check_last(model_kwargs.get("attention_mask"))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass on all positions, because a bias needs the positions of the cached keys too.

        The cache has the name `past_key_values` in every release, by which PEFT looks for it.

        Raises:
            UserError: without tokens, for positions that are not those of all keys, or for a cache
                from which the step would not go on.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        check_goes_on(inputs, kwargs.get("next_sequence_length"))
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        if inputs["input_ids"] is not None and not inputs["input_ids"].shape[1]:
            raise UserError(
                "generate has no tokens to read: prefill_chunk_size splits input_ids and no "
                "inputs_embeds, and a cache needs an attention_mask of all cached and new keys"
            )
        if position_ids is None:
            position_ids = positions_of_gaps(inputs.get("attention_mask"), self.model.relative)
        if position_ids is None:
            return inputs
        mask = mask_of_generation(inputs, position_ids)
        return {**inputs, "position_ids": position_ids, "attention_mask": mask}

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse `generate_batch`, at whose beginning transformers calls this method."""
        refuse_pages()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Keep the padding mask; `dape.attention` adds causality, also for a static cache."""
        return attention_mask
