"""Registration of the models with the Auto classes of transformers.

`dape.model.announce` decides when the module is imported.
"""

from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM, DapeModel, DapePreTrainedModel


class DapeForSequenceClassification(GenericForSequenceClassification, DapePreTrainedModel):
    """A classifier, from token ids `[B, T]` to scores `[B, num_labels]` at the last token.

    The last token is the last before padding.

    Args:
        config: the configuration, with `num_labels` and `pad_token_id`.
    """


for auto_class, model_class in (
    (AutoModel, DapeModel),
    (AutoModelForCausalLM, DapeForCausalLM),
    (AutoModelForSequenceClassification, DapeForSequenceClassification),
):
    auto_class.register(DapeConfig, model_class, exist_ok=True)
