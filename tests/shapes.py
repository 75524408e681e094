"""The checks of jaxtyping's hook without the work that only a failure needs: they find the same."""

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

from jaxtyping import _array_types, _decorator, _storage


def quicken():
    """Let it bind arguments to names, and name dtypes, where it has something to report."""
    _decorator.inspect = SimpleNamespace(**vars(inspect) | {"signature": Late.from_callable})
    arrays = _array_types._MetaAbstractArray
    arrays.__instancecheck_str__ = _remembering(arrays.__instancecheck_str__)
    # A function within another is decorated whenever that runs: equal signatures share a check.
    _decorator._make_fn_with_signature = _of_equal_signatures(_decorator._make_fn_with_signature)
    _decorator._apply_typechecker = cache(_decorator._apply_typechecker)


class Late(inspect.Signature):
    """A signature that binds arguments when they are asked for."""

    def bind(self, *args, **kwargs):
        return Bound(super().bind, args, kwargs)


class Bound:
    """Arguments of a call. The first to ask is the memo of shapes, which seldom needs them."""

    def __init__(self, bind, args, kwargs):
        self.given, self.asked = (bind, args, kwargs), False

    def apply_defaults(self):
        """Leave that to `arguments`."""

    @property
    def arguments(self):
        if self.asked:
            return self.all()
        self.asked = True
        return Names(self)

    def all(self):
        bind, args, kwargs = self.given
        bound = bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments


class Names:
    """The arguments in a memo of shapes: a copy of what the memo took as its own has them all."""

    def __init__(self, bound):
        self.bound, self.taken = bound, False

    def copy(self):
        if self.taken:
            return self.bound.all()
        self.taken = True
        return self


def _of_equal_signatures(make):
    """Return `make` of a check, which makes one for all equal signatures of a local function."""
    once = cache(make)

    def check(name, qualname, module, signature, output):
        defaults = [parameter.default for parameter in signature.parameters.values()]
        plain = all(isinstance(x, type | str | int | float | None) for x in defaults)
        local = "<locals>" in qualname and plain and _hashable(signature)
        return (once if local else make)(name, qualname, module, signature, output)

    return check


def _hashable(signature):
    try:
        hash(signature)
        return True
    except TypeError:
        return False


def _remembering(whole):
    """Return the check of an array, which looks at a dtype once."""
    fitting = set()

    def check(cls, array):
        kind = cls, getattr(array, "dtype", None)
        if kind not in fitting or _storage.get_treeflatten_memo():
            found = whole(cls, array)
            if found == "" and not cls._skip_instancecheck and cls.array_type is not Any:
                fitting.add(kind)
            return found
        if not isinstance(array, cls.array_type):
            return whole(cls, array)
        sizes, groups, trees, names = _storage.get_shape_memo()
        before = sizes.copy(), groups.copy()
        found = "failed"
        try:
            found = cls._check_shape(array, sizes, groups, names)
        finally:
            if found:
                _storage.set_shape_memo(*before, trees, names)
        return found

    return check
