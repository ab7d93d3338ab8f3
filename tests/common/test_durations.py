from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_policies.common.durations import to_ms


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        (0, 0),
        (1_500, 1_500),
        (1_499.6, 1_500),
        (timedelta(seconds=1.5), 1_500),
        (timedelta(days=7), 604_800_000),
        (10**400, 10**400),
    ],
)
def test_milliseconds_and_timedeltas_are_whole_milliseconds(value, ms):
    assert to_ms(value) == ms
    assert type(to_ms(value)) is int


@pytest.mark.parametrize("value", [-1, -0.1, timedelta(seconds=-1), float("nan"), float("inf"), -(10**400)])
def test_a_negative_or_infinite_duration_is_a_value_error(value):
    with pytest.raises(ValueError, match="at least 0 ms"):
        to_ms(value)


@pytest.mark.parametrize("value", [True, None, "5", [5], 5j])
def test_a_duration_that_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="expected milliseconds or a timedelta, got"):
        to_ms(value)


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=365)))
def test_a_timedelta_means_the_same_as_its_milliseconds(duration):
    assert abs(to_ms(duration) - duration / timedelta(milliseconds=1)) <= 0.5
