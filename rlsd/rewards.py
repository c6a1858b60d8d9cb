"""The built-in reward functions, for trainers that take them as objects or by dotted path."""

from .tasks.scorers import (
    code_tests,
    exact_match,
    format_reward,
    math_verify,
    reasoning_gym,
    soft_overlong_punishment,
)

__all__ = [
    "code_tests",
    "exact_match",
    "format_reward",
    "math_verify",
    "reasoning_gym",
    "soft_overlong_punishment",
]
