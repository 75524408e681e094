"""Registration of the models with the Auto classes of transformers.

`dape.model.announce` decides when the module is imported.
"""

from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from dape.model.base import DapePreTrainedModel
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM, DapeModel


class DapeForSequenceClassification(GenericForSequenceClassification, DapePreTrainedModel):
    """A classifier, from token ids `[B, T]` to scores `[B, num_labels]` at the last token.

    The last token is the last before padding.

    Args:
        config: the configuration, with `num_labels` and `pad_token_id`.
    """

    accepts_loss_kwargs = False  # so that `Trainer` divides the loss among accumulated batches


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
