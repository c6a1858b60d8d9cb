import dataclasses
import math

import pytest
import torch

from rlsd_kernels import RLSDLossConfig
from rlsd_kernels.config import check_number

NOT_NUMBERS = [math.nan, math.inf, -math.inf, "0.5", None, True, 1j]
BAD = {
    "rlsd_lambda": [-0.01, 1.01, *NOT_NUMBERS],
    "rlsd_reweight_clip_range": [-0.01, 1.01, *NOT_NUMBERS],
    "rlsd_delta_source": ["teacher", "", None, 1],
    "rlsd_negative_only": [0, 1, "yes", None],
    "epsilon": [-0.01, 1.01, *NOT_NUMBERS],
    "epsilon_high": [-0.01, *NOT_NUMBERS],
    "delta": [1.0, 1, 0.5, -3.0, *[v for v in NOT_NUMBERS if v is not None]],
    "beta": [-1e-9, *NOT_NUMBERS],
    "entropy_coef": [-1e-9, *NOT_NUMBERS],
    "temperature": [0.0, 0, -1.0, *NOT_NUMBERS],
}
GOOD = {
    "rlsd_lambda": [0, 0.0, 1, 1.0],
    "rlsd_reweight_clip_range": [0, 1, 0.999],
    "rlsd_delta_source": ["current", "old_log_probs"],
    "rlsd_negative_only": [True, False],
    "epsilon": [0, 1, 0.3],
    "epsilon_high": [0, 1, 5.0],
    "delta": [None, 1.0001, 10],
    "beta": [0, 0.04, 3],
    "entropy_coef": [0, 0.01, 3],
    "temperature": [1e-3, 1, 100.0],
}


def test_tables_cover_every_option():
    names = {field.name for field in dataclasses.fields(RLSDLossConfig)}
    assert set(BAD) == set(GOOD) == names


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BAD.items() for v in vs])
def test_bad_value_raises_one_sentence_naming_the_option(name, value):
    with pytest.raises(ValueError) as error:
        RLSDLossConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(name) and repr(value) in message
    assert message.endswith(".") and "\n" not in message and ". " not in message


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in GOOD.items() for v in vs])
def test_good_value_is_kept(name, value):
    assert getattr(RLSDLossConfig(**{name: value}), name) == value


def test_defaults_are_those_of_the_contract():
    assert dataclasses.asdict(RLSDLossConfig()) == {
        "rlsd_lambda": 0.5, "rlsd_reweight_clip_range": 0.2, "rlsd_delta_source": "current",
        "rlsd_negative_only": False, "epsilon": 0.2, "epsilon_high": 0.28, "delta": 3.0,
        "beta": 0.0, "entropy_coef": 0.0, "temperature": 1.0,
    }


@pytest.mark.parametrize("name", list(GOOD))
def test_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(RLSDLossConfig(), name, GOOD[name][0])


def test_hashable_and_compared_by_value():
    same, other = RLSDLossConfig(beta=0.1), RLSDLossConfig(beta=0.2)
    assert {RLSDLossConfig(beta=0.1): "x"}[same] == "x"
    assert same != other and len({same, other, RLSDLossConfig(beta=0.1)}) == 2


def test_replace_checks_again():
    with pytest.raises(ValueError, match="^temperature must be a finite number in \\(0, inf\\)"):
        dataclasses.replace(RLSDLossConfig(), temperature=0.0)


@pytest.mark.parametrize(
    "kwargs, bounds",
    [
        ({"low": 0, "high": 1}, r"\[0, 1\]"),
        ({"low": 0}, r"\[0, inf\)"),
        ({"low": 1, "low_open": True}, r"\(1, inf\)"),
    ],
)
def test_check_number_prints_its_interval(kwargs, bounds):
    with pytest.raises(ValueError, match=f"^x must be a finite number in {bounds}, but got -2.0.$"):
        check_number("x", -2.0, **kwargs)


def test_tensor_is_not_a_number():
    with pytest.raises(ValueError, match="^beta must be a finite number"):
        RLSDLossConfig(beta=torch.tensor(0.1))
