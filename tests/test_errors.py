import math

import numpy as np
import pytest

from dape.errors import UserError, check_finite, check_switch, check_whole


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "size=0 must be at least 1"),
        (2**63, f"size={2**63} must be less than 2\\*\\*63"),
        (1.0, "size=1.0 must be a whole number"),
        (True, "size=True must be a whole number"),
        (math.nan, "size=nan must be a whole number"),
        ("1", "size='1' must be a whole number"),
        (None, "size=None must be a whole number"),
    ],
)
def test_what_is_no_whole_number_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        check_whole(size=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True, None, 1j])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(UserError, match=r"scale=.* must be a finite number"):
        check_finite(scale=value)


def test_numbers_of_any_kind_are_taken():
    check_whole(a=1, b=np.int64(3), c=2**63 - 1)
    check_whole(-5, a=-5)
    check_finite(1, a=1, b=1.5, c=np.float32(2))
    check_switch(a=True, b=False)
    with pytest.raises(UserError, match=r"b=0.5 must be at least 1"):
        check_finite(1, a=1, b=0.5)
    with pytest.raises(UserError, match="causal='no' must be True or False"):
        check_switch(causal="no")
