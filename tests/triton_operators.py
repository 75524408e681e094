"""Operators of Triton's interpreter for the operands that kernels have: they compute the same.

Each takes operands of one type of numbers, and makes the array that the whole operator makes, by
the same function of NumPy. It leaves all else to the whole operator.
"""

from functools import cache
from math import prod
from numbers import Number

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_semantic

ARRAYS = {
    "int1": np.dtype(bool), "int32": np.dtype(np.int32), "int64": np.dtype(np.int64),
    "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32), "fp64": np.dtype(np.float64),
}  # fmt: skip
INTEGERS = frozenset(["int32", "int64"])
NUMBERS = frozenset(ARRAYS) - {"int1"}
BITS = INTEGERS | {"int1"}
EVERYWHERE = slice(None)
tensor, new_tensor, new_handle = tl.tensor, tl.tensor.__new__, TensorHandle.__new__


@cache
def sizes_of(shape):
    """Return a shape and its number of elements, as a tensor has them."""
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(prod(shape))


def made(data, held, kind, dtype):
    """Return a tensor of a type and its dtype from an array and the dtype of its handle."""
    handle, value = new_handle(TensorHandle), new_tensor(tensor)
    handle.data, handle.dtype, handle.attr = data, held, {}
    value.handle, value.type, value.dtype = handle, kind, dtype
    value.shape, value.numel = kind.sizes
    return value


class Kinds(dict):
    """Types by the addresses of shapes, which live as long as they are known here."""

    def together(self, dtype, *shapes):
        """Return the type of a dtype with the sizes that all have together; None for none."""
        key = dtype.name, *map(id, shapes)
        if key not in self:
            try:
                sizes = np.broadcast_shapes(*[[n.value for n in shape] for shape in shapes])
            except ValueError:
                return None
            self[key] = tl.block_type(dtype, [*sizes]) if sizes else dtype, shapes
        return self[key][0]

    def product(self, one, other):
        """Return the type of a product in float32; None unless both are matrices that fit."""
        key = "product", id(one), id(other)
        if key not in self:
            sizes = [[size.value for size in shape] for shape in (one, other)]
            (*left, rows, inner), (*right, same, columns) = sizes
            if left != right or inner != same or len(left) > 1:
                return None
            self[key] = tl.block_type(tl.float32, [*left, rows, columns]), (one, other)
        return self[key][0]


kinds, constants = Kinds(), {}


def constant(value, dtype, compared=False):
    """Return the array of a number beside a tensor of a type; None if that is not of the type."""
    value = value.value if type(value) is tl.constexpr else value
    if not isinstance(value, Number):
        return None
    key = dtype.name, type(value), value, compared
    if key not in constants:
        beside = interpreter_semantic.scalar_constant(1, dtype)
        value = interpreter_semantic.to_tensor(value) if compared else value
        left, found = interpreter_semantic.binary_op_type_checking_impl(beside, value)
        fits = left.handle is beside.handle and found.dtype is dtype
        constants[key] = found.handle.data if fits else None
    return constants[key]


def operator(apply, names, reflected=False, compared=False, truth=False):
    """Return a shorter operator of two operands, given the whole.

    Args:
        apply: The function of NumPy.
        names: The types that both may have, or one int32 and the other int64.
        reflected: The second operand comes first.
        compared: A number has a type of its own.
        truth: The result is true or false.
    """

    def shorter(whole):
        def function(value, other):
            dtype, kind, handle = value.dtype, value.type, value.handle
            ours, held = handle.data, handle.dtype
            if type(other) is tensor:
                theirs = other.handle.data
                if other.dtype is not dtype and {dtype.name, other.dtype.name} == INTEGERS:
                    dtype = held = tl.int64
                    ours, theirs = ours.astype(np.int64), theirs.astype(np.int64)
                    kind = kinds.together(dtype, value.shape, other.shape)
                elif other.dtype is not dtype:
                    return whole(value, other)
                elif other.shape is not value.shape:
                    kind = kinds.together(dtype, value.shape, other.shape)
            else:
                theirs = constant(other, dtype, compared) if dtype.name in names else None
            if dtype.name not in names or kind is None or theirs is None:
                return whole(value, other)
            if ours.dtype is not theirs.dtype:
                return whole(value, other)
            found = apply(theirs, ours) if reflected else apply(ours, theirs)
            if truth:
                dtype, kind = tl.int1, kinds.together(tl.int1, kind.sizes[0])
            return made(found, held, kind, dtype)

        return function

    return shorter


def quotient(value, by):
    """Return the quotient of integers as the interpreter does."""
    return (value - np.fmod(value, by)) // by


def either_first(apply):
    """Return a shorter function, given the whole, where a number may come first."""

    def shorter(whole):
        straight = operator(apply, NUMBERS, compared=True)(whole)
        turned = operator(apply, NUMBERS, reflected=True, compared=True)(lambda x, y: whole(y, x))

        def function(x, y, **how):
            if how or (type(x) is not tensor and type(y) is not tensor):
                return whole(x, y, **how)
            return straight(x, y) if type(x) is tensor else turned(y, x)

        return function

    return shorter


def extremes():
    """Return the functions for the larger and the smaller number; some drop NaN, as GPUs do."""
    nan, one = (TensorHandle(np.array([x], np.float32), tl.float32) for x in (np.nan, 1.0))
    keeps = np.isnan(interpreter.interpreter_builder.create_maxnumf(nan, one).data).any()
    return (np.maximum, np.minimum) if keeps else (np.fmax, np.fmin)


def offset(whole):
    """Return a shorter sum, given the whole, of pointers and integers."""

    def function(pointer, by):
        element, kind = element_of(pointer), pointer.type
        if element is None or type(by) is not tensor or by.dtype.name not in INTEGERS:
            return whole(pointer, by)
        if by.shape is not pointer.shape:
            kind = kinds.together(pointer.dtype, pointer.shape, by.shape)
        if kind is None:
            return whole(pointer, by)
        size, handle = max(1, element.primitive_bitwidth // 8), pointer.handle
        found = handle.data + size * by.handle.data.astype(np.uint64)
        return made(found, handle.dtype, kind, pointer.dtype)

    return function


def element_of(pointer):
    """Return the type behind a pointer, None without one of a plain type."""
    dtype = pointer.dtype
    plain = type(dtype) is tl.pointer_type and type(dtype.element_ty) is tl.dtype
    return dtype.element_ty if plain else None


def indexed(whole):
    """Return shorter indexing, given the whole, by `:` and None."""
    known = {}

    def function(value, index):
        if type(index) is not tuple:
            return whole(value, index)
        key = value.dtype.name, id(value.shape), *[place is None for place in index]
        if key in known and all(place is None or place == EVERYWHERE for place in index):
            handle = value.handle
            return made(handle.data[index], handle.dtype, known[key][0], value.dtype)
        found = whole(value, index)
        if value.type.is_block() and len(index) == len(found.shape):
            known[key] = found.type, value.shape
        return found

    return function


def converted(whole):
    """Return a shorter conversion, given the whole, among types of numbers."""

    def function(value, dtype, *how, **named):
        dtype = dtype.value if type(dtype) is tl.constexpr else dtype
        if type(value) is not tensor or how or named or type(dtype) is not tl.dtype:
            return whole(value, dtype, *how, **named)
        given, data = value.dtype, value.handle.data
        if given is dtype:
            return value
        direct = given.name != "fp16" or dtype is tl.float32  # else by float32
        if not direct or dtype.name not in NUMBERS or data.dtype is not ARRAYS.get(given.name):
            return whole(value, dtype)
        kind = kinds.together(dtype, value.shape)
        return made(data.astype(ARRAYS[dtype.name]), dtype, kind, dtype)

    return function


def chosen(whole):
    """Return a shorter choice, given the whole, between tensors and numbers of one type."""

    def function(condition, x, y):
        operands = [value for value in (x, y, condition) if type(value) is tensor]
        dtype = operands[0].dtype if operands else None
        if len(operands) < 2 or type(condition) is not tensor or dtype.name not in NUMBERS:
            return whole(condition, x, y)
        ours, theirs = array_of(x, dtype), array_of(y, dtype)
        if ours is None or theirs is None or condition.dtype is not tl.int1:
            return whole(condition, x, y)
        truth, kind = condition.handle.data, kinds.together(dtype, *[v.shape for v in operands])
        if kind is None or truth.dtype is not ARRAYS["int1"] or ours.dtype is not theirs.dtype:
            return whole(condition, x, y)
        return made(np.where(truth, ours, theirs), dtype, kind, dtype)

    return function


def array_of(value, dtype):
    """Return the array of a tensor of a type, or of a number beside it; else None."""
    if type(value) is not tensor:
        return constant(value, dtype)
    return value.handle.data if value.dtype is dtype else None


def multiplied(whole):
    """Return a shorter product of matrices, given the whole, with sums in float32."""
    zero = np.zeros((), np.float32)

    def function(one, other, acc=None, input_precision=None, **how):
        plain = one.dtype is other.dtype and one.dtype.name in ("fp16", "fp32") and not how
        known = plain and input_precision in (None, "ieee", "tf32", "tf32x3")
        kind = kinds.product(one.shape, other.shape) if known else None
        if kind is None or (acc is not None and acc.type is not kind and acc.type != kind):
            return whole(one, other, acc, input_precision, **how)
        sums = np.matmul(one.handle.data, other.handle.data, dtype=np.float32)
        sums = sums + (zero if acc is None else acc.handle.data)
        return made(sums, tl.float32, kind, tl.float32)

    return function


def counted(whole):
    """Return a shorter `arange`, given the whole."""
    known = {}

    def function(start, end, **how):
        key = tl.core._unwrap_if_constexpr(start), tl.core._unwrap_if_constexpr(end)
        if how:
            return whole(start, end, **how)
        if key not in known:
            known[key] = whole(start, end)
        return made(known[key].handle.data, tl.int32, known[key].type, tl.int32)

    return function


def loaded(whole):
    """Return a shorter load, given the whole, of numbers."""

    def function(pointer, mask=None, other=None, **how):
        element = element_of(pointer)
        if how or element is None or element.name not in NUMBERS:
            return whole(pointer, mask, other, **how)
        array = ARRAYS[element.name]
        visible = spread(mask, pointer, tl.int1, np.ones)
        absent = spread(other, pointer, element, np.zeros)
        if visible is None or absent is None:
            return whole(pointer, mask, other)
        found = interpreter._interpreter.load(pointer.handle.data, visible, absent, array)
        return made(found, element, kinds.together(element, pointer.shape), element)

    return function


def stored(whole):
    """Return a shorter store, given the whole, of numbers."""

    def function(pointer, value, mask=None, **how):
        element = element_of(pointer)
        if how or element is None or element.name not in NUMBERS or pointer.dtype.const:
            return whole(pointer, value, mask, **how)
        visible, given = spread(mask, pointer, tl.int1, np.ones), spread(value, pointer, element)
        if visible is None or given is None:
            return whole(pointer, value, mask)
        found = interpreter._interpreter.store(pointer.handle.data, given, visible)
        return tensor(found, tl.void)

    return function


def spread(value, pointer, dtype, default=None):
    """Return the array of a tensor or a number for each of some pointers; None if none fits."""
    shape, array = pointer.handle.data.shape, ARRAYS[dtype.name]
    if value is None:
        return default(shape, array)
    if type(value) is tensor:
        found = value.handle.data
        if value.dtype is not dtype or found.dtype is not array:
            return None
        if value.shape is not pointer.shape:
            kind = kinds.together(pointer.dtype, pointer.shape, value.shape)
            if kind is None or kind.sizes is not pointer.type.sizes:
                return None
    elif isinstance(value, Number):
        key = dtype.name, type(value), value
        if key not in constants:
            number = interpreter_semantic.to_tensor(value)
            constants[key] = interpreter_semantic.cast(number, dtype).handle.data
        found = constants[key]
    else:
        return None
    return found if found.shape == shape else np.broadcast_to(found, shape)


ARITHMETIC = {
    "add": (np.add, NUMBERS), "sub": (np.subtract, NUMBERS), "mul": (np.multiply, NUMBERS),
    "truediv": (np.divide, {"fp32", "fp64"}), "floordiv": (quotient, INTEGERS),
    "mod": (np.fmod, INTEGERS), "and": (np.bitwise_and, BITS), "or": (np.bitwise_or, BITS),
}  # fmt: skip
COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": np.not_equal,
}  # fmt: skip
METHODS = {f"__{name}__": operator(*how) for name, how in ARITHMETIC.items()}
METHODS |= {f"__r{name}__": operator(*how, reflected=True) for name, how in ARITHMETIC.items()}
METHODS |= {
    f"__{name}__": operator(apply, NUMBERS, compared=True, truth=True)
    for name, apply in COMPARISONS.items()
}
METHODS["__add__"] = lambda whole: operator(*ARITHMETIC["add"])(offset(whole))
METHODS |= {"__getitem__": indexed, "to": converted}
LARGER, SMALLER = extremes()
FUNCTIONS = {
    "where": chosen, "dot": multiplied, "load": loaded, "store": stored, "cast": converted,
    "arange": counted,
    "maximum": either_first(LARGER), "minimum": either_first(SMALLER),
}  # fmt: skip
