"""A checked call of attention, parts over rows and keys, and the result."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad

from dape.errors import UserError, check_finite, check_switch, check_whole
from dape.positions.adapter import DAPE, CoPE, TalkingHeads, TransformerXL
from dape.positions.bias import Bias
from dape.positions.given import WHOLE, check_positions, fits
from dape.positions.rotary import RoPE
from dape.positions.wide import without_overflow

FORWARD_MODE = "forward-mode derivatives"


class Call(NamedTuple):
    """The arguments of `dape.attention`, in the form for backends.

    Args:
        mask: true where a key may be seen, with four axes.
        query_offset: index of the first query; the query at index i sees keys at indices j <= i.
        key_offset: index of the first key, 0 unless the keys are a part of all.
        query_positions: positions of the queries, by default the indices; `key_positions` likewise.
        halo: numbers of first and of last keys without weight, visible to the adapter alone.
        begun: true for rows that may see a key before the first; None without earlier keys.
        out_dtype: dtype of the output, by default the dtype of the value.
    """

    query: Float[Tensor, "batch heads query head_dim"]
    key: Float[Tensor, "batch kv_heads key head_dim"]
    value: Float[Tensor, "batch kv_heads key value_dim"]
    bias: nn.Module | None = None
    adapter: nn.Module | None = None
    mask: Bool[Tensor, "#batch 1 #query key"] | None = None
    causal: bool = True
    scale: float = 1.0
    query_offset: int | Int[Tensor, ""] = 0
    key_offset: int = 0
    query_positions: Int[Tensor, "*batch query"] | None = None
    key_positions: Int[Tensor, "*batch key"] | None = None
    halo: tuple[int, int] = (0, 0)
    begun: Bool[Tensor, "#batch 1 #query"] | None = None
    out_dtype: torch.dtype | None = None

    @property
    def shift(self) -> int | Int[Tensor, ""]:
        """Return the index of the first query, counted from the first key."""
        return self.query_offset - self.key_offset

    @property
    def masks(self) -> bool:
        """Return whether a key may be without weight for a query."""
        return self.causal or self.mask is not None or self.halo != (0, 0)

    @property
    def positioned(self) -> bool:
        """Return whether positions are given, and therefore arbitrary."""
        return self.query_positions is not None or self.key_positions is not None

    @property
    def result(self) -> torch.dtype:
        """Return the dtype of the output."""
        return self.value.dtype if self.out_dtype is None else self.out_dtype

    def positions(self) -> tuple[Int[Tensor, "*batch query"], Int[Tensor, "*batch key"]]:
        """Return the positions of the queries and of the keys."""
        device, (query, key) = self.query.device, (self.query_positions, self.key_positions)
        if query is None:
            query = torch.arange(self.query.shape[2], device=device) + self.query_offset
        if key is None:
            key = torch.arange(self.key.shape[2], device=device) + self.key_offset
        return query, key

    def own_dtypes(self) -> AbstractContextManager[Any]:
        """Return the context in which tensors keep their dtypes, without autocast."""
        kind = self.query.device.type
        return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)

    def visible(self) -> Bool[Tensor, "#batch 1 query key"]:
        """Return the visible keys of each query."""
        rows, keys = self.query.shape[2], self.key.shape[2]
        return visibility(rows, keys, self.mask, self.causal, self.shift, self.query.device)

    def part(self, rows: slice, keys: slice) -> "Call":
        """Return the call of some rows and keys, with their indices; slices have both ends."""
        query, key = self.query_positions, self.key_positions
        mask, begun = self.mask, self.begun
        if mask is not None:
            mask = mask[..., rows if mask.shape[2] > 1 else slice(None), keys]
        if begun is not None and begun.shape[2] > 1:
            begun = begun[..., rows]
        halo = self.halo
        if halo != (0, 0):
            end = self.key.shape[2] - halo[1]
            halo = max(0, halo[0] - keys.start), max(0, keys.stop - end)
        return self._replace(
            query=self.query[:, :, rows],
            key=self.key[:, :, keys],
            value=self.value[:, :, keys],
            mask=mask,
            query_offset=self.query_offset + rows.start,
            key_offset=self.key_offset + keys.start,
            query_positions=None if query is None else query[..., rows],
            key_positions=None if key is None else key[..., keys],
            halo=halo,
            begun=begun,
        )

    def widened(self) -> "Call":
        """Return the call in float32, or float64 if a tensor is, with the dtype of output kept.

        A product of 16-bit numbers is exact in float32, and also in TF32, because TF32 holds 11
        bits. On a GPU the product takes no longer than a product in 16 bits with a pass to widen
        the result.
        """
        query, key, value = widened(self.query, self.key, self.value)
        return self._replace(query=query, key=key, value=value, out_dtype=self.result)


class Attended(NamedTuple):
    """The result of a call: the output, and requested further results.

    `lse` is the log-sum-exp of the logits of each row, -inf for a query without visible keys.
    """

    out: Float[Tensor, "batch heads query value_dim"]
    lse: Float[Tensor, "batch heads query"] | None = None
    weights: Float[Tensor, "batch heads query key"] | None = None


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: nn.Module | None = None,
    adapter: nn.Module | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    causal: bool = True,
    query_offset: int | Tensor = 0,
    key_offset: int = 0,
) -> Call:
    """Return the call with the arguments of `dape.attention`.

    Raises:
        UserError: for shapes, dtypes and modules that do not fit together.
    """
    check(query, key, value, bias, adapter)
    check_where(query, key, mask, query_positions, key_positions)
    _check_devices(query, key=key, value=value, mask=mask)
    check_numbers(causal, scale, query_offset, key_offset)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    query_positions, key_positions = (
        None if x is None else without_overflow(x) for x in (query_positions, key_positions)
    )
    if isinstance(query_offset, Tensor):
        query_offset = without_overflow(query_offset).reshape(())
    return Call(
        query, key, value, bias, adapter, mask, causal, scale, query_offset, key_offset,
        query_positions, key_positions,
    )  # fmt: skip


def widened(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors in float32, or in float64 with a float64 tensor."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def visibility(
    rows: int,
    keys: int,
    mask: Bool[Tensor, "#batch 1 #query key"] | None,
    causal: bool,
    shift: int | Int[Tensor, ""],
    device: torch.device,
) -> Bool[Tensor, "#batch 1 query key"]:
    """Return the visible keys of each query: key j <= i + shift if causal, and the mask."""
    visible = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device)
    if causal:
        places = torch.arange(rows, device=device) + shift
        visible = (torch.arange(keys, device=device) <= places[:, None])[None, None]
    return visible if mask is None else visible & mask


def transform() -> str | None:
    """Return the transform in force that a kernel with a backward pass alone cannot follow."""
    if forward_ad._current_level >= 0:
        return FORWARD_MODE
    return "transforms of torch.func" if torch._C._are_functorch_transforms_active() else None


def check(
    query: Tensor, key: Tensor, value: Tensor, bias: nn.Module | None, adapter: nn.Module | None
) -> None:
    """Raise a `UserError` for tensors and modules that do not fit together."""
    _check_tensors(query=query, key=key, value=value)
    reason = _misfit(query, key, value)
    if reason is not None:
        shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        raise UserError(f"{shapes}: {reason}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UserError(
                f"the {name} is {tensor.dtype}; attention takes floating-point numbers of 16 bits "
                f"or more, such as {name}.float()"
            )
    if query.dtype != key.dtype:
        raise UserError(
            f"the query is {query.dtype}, but the key {key.dtype}; give both in one dtype"
        )
    _check_modules(query, bias, adapter)


def _check_modules(query: Tensor, bias: nn.Module | None, adapter: nn.Module | None) -> None:
    """Raise a `UserError` for a bias or an adapter that does not fit the query."""
    if isinstance(bias, (DAPE, TalkingHeads, CoPE, TransformerXL)):
        raise UserError(f"bias={type(bias).__name__}(...) is an adapter; say adapter=")
    if isinstance(adapter, Bias):
        raise UserError(f"adapter={type(adapter).__name__}(...) is a bias; say bias=")
    for name, module in (("bias", bias), ("adapter", adapter)):
        if module is None:
            continue
        if isinstance(module, RoPE):
            raise UserError(
                f"{name}={type(module).__name__}(...) is a rotation; turn query and key before the "
                "call, by rotation(query, key, positions)"
            )
        if not callable(module) or isinstance(module, type):
            given = f"a tensor {list(module.shape)}" if isinstance(module, Tensor) else repr(module)
            raise UserError(
                f"{name}={given} is no module; give one, such as dape.Kerple(num_heads) or "
                "dape.DAPE(num_heads)"
            )
        for size, axis in (("num_heads", 1), ("head_dim", 3)):
            built = getattr(module, size, query.shape[axis])
            if built != query.shape[axis]:
                raise UserError(
                    f"{name} has {size}={built}, but the query {list(query.shape)} has "
                    f"{query.shape[axis]}"
                )


def _check_devices(query: Tensor, **others: Tensor | None) -> None:
    """Raise a `UserError` for a tensor on another device than the query.

    Kernels that are started by addresses cannot tell.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != query.device:
            raise UserError(
                f"{name} is on {tensor.device}, and the query on {query.device}; give both on one "
                "device"
            )


def _check_tensors(**values: Any) -> None:
    """Raise a `UserError` for a value that is no tensor, and not None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise UserError(f"{name} is a {type(value).__name__}; give a torch.Tensor")


def _misfit(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why the shapes of query, key and value do not fit together, or None."""
    if not query.ndim == key.ndim == value.ndim == 4:
        return "each needs four axes [batch, heads, length, head_dim]"
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return "query and key differ in batch or head_dim"
    if key.shape[:3] != value.shape[:3]:
        return "key and value differ in batch, heads or length"
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return "the query heads must be a multiple of the key heads"
    if 0 in (*query.shape, *key.shape):
        return "an axis is empty; there must be a query and a key"
    return None


def check_numbers(
    causal: bool, scale: float | None, query_offset: int | Tensor, key_offset: int
) -> None:
    """Raise a `UserError` for numbers that are not finite, or of a wrong type."""
    if torch.compiler.is_compiling():
        return
    check_switch(causal=causal)
    if scale is not None:
        check_finite(scale=scale)
    check_whole(-(2**63), key_offset=key_offset)
    if not isinstance(query_offset, Tensor):
        check_whole(-(2**63), query_offset=query_offset)
    elif query_offset.dtype not in WHOLE or query_offset.numel() != 1:
        shape = list(query_offset.shape)
        raise UserError(f"query_offset {shape} is {query_offset.dtype}; give a whole number")


def check_where(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> None:
    """Raise a `UserError` for a mask or positions that do not fit the queries and keys."""
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    _check_tensors(mask=mask)
    for name, positions, length in (
        ("query_positions", query_positions, rows),
        ("key_positions", key_positions, keys),
    ):
        if positions is not None:
            check_positions(positions, batch, length, name)
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise UserError(f"mask has dtype {mask.dtype}; it must be torch.bool, true where seen")
    if not fits(mask, ((batch,), (keys,)), ((1, batch), (1,), (1, rows), (keys,))):
        raise UserError(
            f"mask {list(mask.shape)} must be [batch, keys] = [{batch}, {keys}] or "
            f"[batch, 1, queries, keys] = [1 or {batch}, 1, 1 or {rows}, {keys}]"
        )
