"""Triton's interpreter without the work that it repeats: it computes the same."""

from dataclasses import replace
from functools import cache, lru_cache
from math import prod
from numbers import Number

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

HALVES = tl.float16, tl.bfloat16


def quicken():
    """Let it prepare once what it prepares for every call of a function and every tensor."""
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = cache(interpreter._patch_lang)
    interpreter._patch_attr = _call_directly
    _remember_dtypes()
    _remember_shapes()
    _look_at_types_first()
    _let_numpy_broadcast()
    # Each sum of integers is computed again in 64 bits, for an assertion that `debug` would make.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def _call_directly(obj, name, member, builder, scope):
    """Put a function of the language in its place, without the two around it."""
    if member.__code__.co_qualname == "builtin.<locals>.wrapper":
        member = member.__wrapped__

    def function(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, function)


def _remember_dtypes():
    of_scalar = cache(interpreter._get_np_dtype)
    pointer = of_scalar(tl.uint64)

    def dtype(kind):
        scalar = kind.scalar
        return pointer if scalar.is_ptr() else of_scalar(scalar)

    interpreter._get_np_dtype = dtype


def _remember_shapes():
    begin, known = tl.block_type.__init__, {}

    def block_type(kind, element_ty, shape):
        key = element_ty.name, *map(tl.core._unwrap_if_constexpr, shape)
        if key not in known:
            begin(kind, element_ty, shape)
            known[key] = vars(kind) | {"sizes": sizes(key[1:]), "numbers": key[1:]}
        vars(kind).update(known[key])

    @cache
    def sizes(shape):
        return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(prod(shape))

    def tensor(value, handle, kind):
        value.handle, value.type, value.dtype = handle, kind, kind.scalar
        value.shape, value.numel = kind.sizes if kind.is_block() else sizes(())

    def broadcast(semantic, one, other):  # equal shapes are one object
        return (one, other) if one.shape is other.shape else whole(semantic, one, other)

    whole = TritonSemantic.broadcast_impl_value
    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    TritonSemantic.broadcast_impl_value = broadcast


def _look_at_types_first():
    """Answer at once where a look at the types is enough."""
    plain = {int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type}
    unwrap, equal = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    validate = interpreter.TensorHandle.__post_init__

    def handle(value, data, dtype, attr=None):
        value.data, value.dtype, value.attr = data, dtype, {} if attr is None else attr
        if type(dtype) is not tl.dtype or data.itemsize * 8 > dtype.primitive_bitwidth:
            validate(value)

    tl.core._unwrap_if_constexpr = lambda x: x if type(x) in plain else unwrap(x)
    tl.dtype.__eq__ = lambda kind, other: kind is other or equal(kind, other)
    interpreter.TensorHandle.__init__ = handle


def _let_numpy_broadcast():
    """Leave the sizes of two operands to NumPy, which computes what the interpreter does of both.

    Their types are those of the result, as if they had been expanded.
    """
    whole = TritonSemantic.binary_op_type_checking_impl

    def checked(
        semantic, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True,
        div_or_mod=False,
    ):  # fmt: skip
        how = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        one, other = lhs, rhs
        if type(lhs) is not tl.tensor:
            one = number(lhs, rhs, how, True)
        elif type(rhs) is not tl.tensor:
            other = number(rhs, lhs, how, False)
        if one is None or other is None:
            return whole(semantic, lhs, rhs, *how)
        kind, of_other = one.dtype, other.dtype
        if kind is not of_other:
            if not (allow_lhs_ptr and type(kind) is tl.pointer_type and of_other is tl.int32):
                return whole(semantic, lhs, rhs, *how)
        elif type(kind) is not tl.dtype or (div_or_mod and kind in HALVES):
            return whole(semantic, lhs, rhs, *how)
        if one.shape is other.shape:
            return one, other
        kinds = joined(one.type, other.type)
        if kinds is None:
            return whole(semantic, lhs, rhs, *how)
        return tl.tensor(one.handle, kinds[0]), tl.tensor(other.handle, kinds[1])

    def number(value, beside, how, first):
        plain = type(beside) is tl.tensor and type(beside.dtype) is tl.dtype
        if not plain or not isinstance(value, Number):
            return None
        return constant(type(value), value, beside.dtype, how, first)

    @lru_cache(2**12)
    def constant(kind, value, dtype, how, first):
        """Return a number as a tensor without sizes, unless the operand beside it changes too."""
        beside = tl.tensor(interpreter.TensorHandle(np.zeros(1, np_dtype(dtype)), dtype), dtype)
        pair = (value, beside) if first else (beside, value)
        found = whole(interpreter.interpreter_semantic, *pair, *how)
        found, left = found if first else found[::-1]
        return found if left.dtype is dtype is found.dtype else None

    def joined(one, other):
        """Return both types with the sizes that they have together; None if they have none."""
        key = one.scalar.name, shape_of(one), other.scalar.name, shape_of(other)
        if key not in pairs:
            try:
                shape = [*np.broadcast_shapes(key[1], key[3])]
                pairs[key] = [tl.block_type(kind.scalar, shape) for kind in (one, other)]
            except ValueError:
                pairs[key] = None
        return pairs[key]

    def shape_of(kind):
        return kind.numbers if kind.is_block() else ()

    pairs = {}
    np_dtype = interpreter._get_np_dtype
    TritonSemantic.binary_op_type_checking_impl = checked
