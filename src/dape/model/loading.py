"""Pretrained causal language models, without missing or unused weights."""

import hashlib
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from dape.data.hub import fetch
from dape.device import device_of
from dape.errors import UserError, first_line, out_of_memory
from dape.model.position_tables import reaching
from dape.model.rotation import OLDER, ROTATION, changed_rotation
from dape.runs import RunFolder

_NAMED = 3  # weights named in an error
_SAMPLED = 64  # numbers of a parameter in the fingerprint


def load_config(source: str, **changes: Any) -> Any:
    """Return the configuration of a model, with changed keys.

    With `return_unused_kwargs=True` the result is the configuration and the unknown keys, as in
    transformers.

    Code beside the configuration is never run.

    Raises:
        UserError: for a missing or damaged configuration, or a rotation that does not fit.
    """
    if len(names := changes.keys() & {ROTATION, OLDER}) > 1:
        raise UserError(
            f"{ROTATION} and {OLDER} of {source} are two names of one rotation;"
            f" give {ROTATION} alone"
        )
    for name in names:
        own = getattr(load_config(source), ROTATION, None)
        given = changed_rotation(f"{name} of {source}", own or {}, changes.pop(name))
        changes[name if own is None else ROTATION] = given
    try:
        return fetch(AutoConfig.from_pretrained, source, trust_remote_code=False, **changes)
    except (AttributeError, KeyError, RecursionError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"config.json of {source} is not a configuration of a model ({reason}); save the model"
            " again"
        ) from None


def load_causal(
    source: str, partial_weights: bool = False, longest: int = 0, **options: Any
) -> PreTrainedModel:
    """Return the model in a folder or of a name on the hub, on the CPU.

    transformers draws missing weights at random, and continues. `partial_weights` allows the same
    here, with the same numbers in every load. A table of positions stored by formula holds
    `longest` tokens. `options` go to `from_pretrained`.

    Raises:
        UserError: for an unknown model, damaged files, or missing or unused weights.
    """
    config = reaching(options.pop("config", None) or load_config(source), longest)
    options = _attention(config) | options | {"config": config}
    verbosity = logging.get_verbosity()
    if not partial_weights:
        logging.set_verbosity_error()  # the error below replaces the warning
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)  # for missing weights
            model, report = fetch(
                AutoModelForCausalLM.from_pretrained,
                source,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except (SafetensorError, RuntimeError, UnpicklingError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"the weights of {source} cannot be read: {first_line(error)}") from None
    except (AttributeError, KeyError, TypeError) as error:  # of generation_config.json, mostly
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"the files of {source} cannot be read ({reason})") from None
    finally:
        logging.set_verbosity(verbosity)
    if not partial_weights:
        _refuse(source, {"misses": report["missing_keys"], "has": report["unexpected_keys"]})
    return model


def _cap(config: Any) -> float | None:
    """Return the cap of the scores, as of Gemma 2, which PyTorch's attention leaves out."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def _attention(config: Any) -> dict[str, Any]:
    """Return the option of loading for a model that caps scores.

    PyTorch's attention is the default of transformers.
    """
    return {"attn_implementation": "eager"} if _cap(config) else {}


def check_capped(model: nn.Module, source: str) -> None:
    """Refuse a model in memory that leaves out the cap of the scores.

    Raises:
        UserError: naming the model and the remedy.
    """
    config: Any = model.config
    if _cap(config) and config.get_text_config()._attn_implementation == "sdpa":
        raise UserError(
            f"{source} leaves out attn_logit_softcapping={_cap(config)}, as PyTorch's attention"
            " does; call set_attn_implementation('eager') of the model"
        )


@torch.inference_mode()
def check_causal(model: nn.Module, source: str) -> None:
    """Refuse a model whose predictions read later tokens, which makes every loss too low.

    After the same first tokens, two texts need the same predictions, up to rounding. transformers
    loads BERT, XLNet and others as causal models that read in both directions. The first token may
    count as padding.

    Raises:
        UserError: naming the model.
    """
    device = device_of(model, torch.device("cpu"))
    texts = torch.tensor([[0, 1, 2, 1, 1, 1], [0, 1, 2, 2, 2, 2]], device=device)
    found = model(input_ids=texts, use_cache=False).logits
    first, second = found[:, :3].float()
    rounding = torch.finfo(found.dtype).eps ** 0.5 * first.abs().max()
    if (first - second).abs().max() > rounding:
        raise UserError(
            f"{source} ({type(model).__name__}) reads later tokens, and is no causal language"
            " model; give a model that reads from left to right, such as a BERT with"
            " is_decoder=true in config.json"
        )


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return a checksum of the first numbers of all parameters, equal for loads in any precision.

    The numbers are rounded to bfloat16. A further training moves some of them.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.flatten()[:_SAMPLED].to("cpu", torch.bfloat16)
        found.update(name.encode() + first.view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]


def check_base(model: nn.Module, source: str, run: RunFolder) -> str:
    """Return the fingerprint of the base of a fine-tuning, the same as when the run began.

    Raises:
        UserError: for a base that was changed since.
    """
    found = fingerprint(model)
    if run.read_record().get("base_weights", found) != found:
        raise UserError(
            f"the weights of {source} changed since the training of {run} began; put the first"
            " weights back, or train again under another --name"
        )
    return found


def _refuse(source: str, faults: dict[str, set[str]]) -> None:
    """Raise a `UserError` for missing or unused weights, naming the weights."""
    found = [_listed(verb, sorted(names)) for verb, names in faults.items() if names]
    if found:
        raise UserError(
            f"the weights in {source} do not fit the configuration: the file {' and '.join(found)};"
            " save the whole model again (`dape eval --partial-weights` measures the model anyway)"
        )


def _listed(verb: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    left_over = " without a place" if verb == "has" else ""
    return f"{verb} {', '.join(names[:_NAMED])}{more}{left_over}"
