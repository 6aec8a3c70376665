"""What is hashed, what is not, and that a hash never changes by accident."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capacity_gap.settings.declare import setting
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import fingerprint
from capacity_gap.settings.scales import format_scale, parse_scale, parse_tokens


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    device: str = setting("cpu", "Where.", decides=False)
    added: int = setting(3, "Added later.", later=True)


def test_golden_digests_stay():
    assert fingerprint({"a": 1, "b": [0.1, None, "x", True]}) == "f24fcc6fb0c3d7eaf3a8"
    assert fingerprint(Settings()) == fingerprint({"rate": 0.1})


def test_order_of_keys_does_not_matter_but_of_lists_does():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_one_and_one_point_zero_and_true_differ():
    assert len({fingerprint(1), fingerprint(1.0), fingerprint(True), fingerprint("1")}) == 4


def test_runtime_fields_do_not_count_and_later_fields_only_off_their_default():
    assert fingerprint(Settings(device="cuda")) == fingerprint(Settings())
    assert fingerprint(Settings(added=4)) != fingerprint(Settings())


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}, b"x", {1: 2}, lambda: 0])
def test_what_has_no_one_spelling_raises(value):
    with pytest.raises(TypeError):
        fingerprint({"x": value})


@given(st.integers(1, 10**13))
def test_scales_round_trip(count):
    assert parse_scale(format_scale(count), key="x") == count


@pytest.mark.parametrize(
    ("given", "expected"), [("0.5b", 5 * 10**8), ("350m", 350_000_000), ("40K", 40_000), (60000, 60_000)]
)
def test_scales_as_people_write_them(given, expected):
    assert parse_scale(given, key="student") == expected


@pytest.mark.parametrize("given", ["", "k", "-1", "1.5", "0", "1e6", "nan", "ten"])
def test_unreadable_scales_say_what_is_allowed(given):
    with pytest.raises(ConfigError, match="student=.*Write a whole number"):
        parse_scale(given, key="student")


def test_tokens_per_parameter():
    assert parse_tokens("20x", params=1000, key="d") == 20_000
    assert parse_tokens("3k", params=1000, key="d") == 3_000
