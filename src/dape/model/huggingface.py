"""The models at home in transformers: importing this makes its Auto classes know them.

`import dape` leads here: `dape.model.announce` brings the configuration along with the Auto
classes, and the first `DapeConfig` brings the models.
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
    """The decoder stack with `num_labels` scores, read at the last token that is no padding."""


for auto_class, model_class in (
    (AutoModel, DapeModel),
    (AutoModelForCausalLM, DapeForCausalLM),
    (AutoModelForSequenceClassification, DapeForSequenceClassification),
):
    auto_class.register(DapeConfig, model_class, exist_ok=True)
