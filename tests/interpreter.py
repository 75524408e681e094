"""Triton's interpreter without the work that it repeats: it computes the same."""

from dataclasses import replace
from functools import cache
from math import prod

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken():
    """Let it prepare once what it prepares for every call of a function and every tensor."""
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = cache(interpreter._patch_lang)
    _remember_dtypes()
    _remember_shapes()
    # Each sum of integers is computed again in 64 bits, for an assertion that `debug` would make.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


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
            known[key] = vars(kind) | {"sizes": sizes(key[1:])}
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
