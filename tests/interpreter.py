"""Triton's interpreter without the work that it repeats: it computes the same."""

from dataclasses import replace
from functools import cache

import triton.language as tl
from triton.runtime import interpreter

from triton_operators import FUNCTIONS, METHODS, sizes_of


def quicken():
    """Let it prepare once what it prepares for every call of a function and every tensor."""
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = cache(interpreter._patch_lang)
    interpreter._patch_attr = _call_directly
    _remember_dtypes()
    _remember_shapes()
    # Each sum of integers is computed again in 64 bits, for an assertion that `debug` would make.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def _call_directly(obj, name, member, builder, scope):
    """Put a function of the language in its place, without the two around it."""
    if member.__code__.co_qualname == "builtin.<locals>.wrapper":
        member = member.__wrapped__
    shorter = (METHODS if obj is tl.tensor else FUNCTIONS).get(name)

    def function(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, shorter(function) if shorter else function)


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
            known[key] = vars(kind) | {"sizes": sizes_of(key[1:]), "numbers": key[1:]}
        vars(kind).update(known[key])

    def tensor(value, handle, kind):
        value.handle, value.type, value.dtype = handle, kind, kind.scalar
        value.shape, value.numel = kind.sizes

    tl.dtype.sizes = sizes_of(())
    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
