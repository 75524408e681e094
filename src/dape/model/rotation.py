"""The rotation of a model of transformers: changes beside what the model has, and a check."""

from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from dape.errors import UserError, unknown

ROTATION = "rope_parameters"
OLDER = "rope_scaling"  # the name in older files
_TYPES = {"default", *ROPE_INIT_FUNCTIONS}
_KEYS = {*RopeParameters.__annotations__, "mscale", "mscale_all_dim", "truncate"}
_KEPT = {"rope_theta", "partial_rotary_factor"}  # in every type


def changed_rotation(what: str, own: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """Return the parameters of a changed rotation.

    transformers drops all parameters but the given ones, and GPT-NeoX would turn whole heads. Here
    the base of the frequencies and the turned part of a head stay. Within a type, all parameters
    stay.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{what}: {given!r} must map names to values")
    if any(isinstance(each, Mapping) for each in own.values()):  # of each kind of layer
        if other := given.keys() - own.keys():
            raise unknown(f"kind of layer in {what}", min(other), own)
        new = {kind: changed_rotation(what, own[kind] or {}, given[kind]) for kind in given}
        return {**own, **new}
    if other := given.keys() - own.keys() - _KEYS:
        raise unknown(f"key in {what}", min(other), _KEYS.union(own))
    before = own.get("rope_type", "default")
    kind = given.get("rope_type", before)
    if kind not in {before, *_TYPES}:
        raise unknown("rope_type", str(kind), _TYPES)
    return {**{name: own[name] for name in own if kind == before or name in _KEPT}, **given}


def check_rotation(source: str, config: Any) -> None:
    """Raise a `UserError` for a rotation without a parameter that the type needs."""
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except KeyError as error:
        raise UserError(f"{ROTATION} of {source}: {error.args[0]}") from None
