"""Positions that a caller gives: numbers wide enough, one for every token."""

import torch
from torch import Tensor

from dape.errors import UserError

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (*WHOLE, torch.uint16, torch.float32, torch.float64)


def check_positions(positions: Tensor, batch: int, length: int, name: str = "positions") -> None:
    """Raise a `UserError` for positions that do not fit the tokens, or of an unfit dtype."""
    check_exact(positions, name)
    if not fits(positions, ((length,),), ((1, batch), (length,))):
        raise UserError(
            f"{name} {list(positions.shape)} must be [{length}] or [1 or {batch}, {length}]"
        )


def check_exact(positions: Tensor, name: str = "positions") -> None:
    """Raise a `UserError` for positions in a dtype that rounds, as bfloat16 does above 256."""
    if not isinstance(positions, Tensor):
        raise UserError(f"{name} is a {type(positions).__name__}; give a torch.Tensor")
    if positions.dtype not in _DTYPES:
        raise UserError(
            f"{name} {list(positions.shape)} are {positions.dtype}; positions are whole numbers"
            " of torch.int64"
        )


def fits(tensor: Tensor, *forms: tuple[tuple[int, ...], ...]) -> bool:
    """Return whether a tensor has one of the forms, each with the lengths allowed on each axis."""
    # In compiled code `in` does not find a length of a symbol in a tuple, and `==` does.
    return any(
        len(form) == tensor.ndim
        and all(any(n == one for one in fit) for n, fit in zip(tensor.shape, form, strict=True))
        for form in forms
    )
