"""Registration of the models with the Auto classes of transformers.

`dape.model.announce` decides when the module is imported.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils.generic import can_return_tuple

from dape.errors import UserError
from dape.model.arguments import CACHE, by_either_name
from dape.model.base import DapePreTrainedModel
from dape.model.conditions import look, refuse, unchecked
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM, DapeModel

_HIDDEN = (
    "a row has no last token, as attention_mask hides all of its new tokens, or all are"
    " pad_token_id: leave the row out, or give attention_mask [batch, keys]"
)


class DapeForSequenceClassification(GenericForSequenceClassification, DapePreTrainedModel):
    """A classifier, from token ids `[B, T]` to scores `[B, num_labels]` at the last token.

    The last token is the last that `attention_mask` `[B, Tk]` shows, also where the token is
    `pad_token_id`. Without such a mask, the last token is the last other than `pad_token_id`.

    Args:
        config: the configuration, with `num_labels` and `pad_token_id`.
    """

    accepts_loss_kwargs = False  # so that `Trainer` divides the loss among accumulated batches

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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return scores `[B, num_labels]`, and with `labels` `[B]` the loss.

        Args:
            input_ids: token ids `[B, T]`.
            attention_mask: as in `DapeModel.forward`.
            position_ids: as in `DapeModel.forward`.
            past_key_values: the cache of earlier keys and values.
            inputs_embeds: vectors `[B, T, C]` in place of `input_ids`.
            labels: classes `[B]`, or numbers, as the `problem_type` of the configuration says.
            use_cache: whether to return a cache.
            cache: newer name of `past_key_values`.
            kwargs: further arguments of `DapeModel.forward`.

        Raises:
            UserError: as `DapeModel.forward`, and for a batch whose padding is unknown.
        """
        cache = by_either_name(past_key_values, cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = outputs.last_hidden_state
        last = self._last_token(states, input_ids, attention_mask, past)
        scores = self.score(states[torch.arange(states.shape[0], device=states.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=scores, labels=labels, pooled_logits=scores, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss, scores, getattr(outputs, CACHE), outputs.hidden_states, outputs.attentions
        )

    def _last_token(
        self, states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, past: int
    ) -> Tensor:
        """Return the index `[B]` of the last token before padding."""
        batch, length = states.shape[:2]
        index, padding = torch.arange(length, device=states.device), self.config.pad_token_id
        if attention_mask is not None and attention_mask.ndim == 2:
            tokens = attention_mask[:, past : past + length].bool()
        elif input_ids is None or padding is None:
            if batch > 1:
                given = "inputs_embeds" if input_ids is None else "pad_token_id=None"
                raise UserError(
                    f"{given}, and any of the {batch} rows may end in padding: give attention_mask "
                    "[batch, keys], or input_ids and pad_token_id in the configuration"
                )
            return index[-1:]
        else:
            tokens = input_ids != padding
        if not unchecked():
            refuse(look((~tokens).all(-1).any()), _HIDDEN)
        return index.where(tokens.to(index.device), -1).argmax(-1)


# By the names, `Trainer` shifts smoothed labels, and pipelines know the models.
for auto_class, model_class, names in (
    (AutoModel, DapeModel, MODEL_MAPPING_NAMES),
    (AutoModelForCausalLM, DapeForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        AutoModelForSequenceClassification,
        DapeForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
):
    auto_class.register(DapeConfig, model_class, exist_ok=True)
    names[DapeConfig.model_type] = model_class.__name__
