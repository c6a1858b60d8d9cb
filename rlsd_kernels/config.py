"""Options of the RLSD loss, checked once when they are set.

Source: arXiv 2604.03128, sections on the token weight and the clipped surrogate; the defaults are
those of the paper's experiments.
"""

import math
from dataclasses import dataclass
from numbers import Real

import torch

DELTA_SOURCES = ("current", "old_log_probs")
# exp(80) still fits fp32: bounds ratios so that no inf * 0 can appear in a backward pass.
MAX_LOG_RATIO = 80.0
# A row whose sum of exp(z - c) leaves these bounds had a bad guess c, by 18 nats, and is done again
# with its true maximum. Inside, no term that counts is flushed to zero, neither E W nor 1 / s can
# leave fp32, and the entropy log s - t / s is no difference of large numbers.
ROW_SUM_BOUNDS = (1e-8, 1e8)
# What an implementation adds up over the tokens that it is given, in fp64 and in this order; a
# token is active if it is unmasked with A != 0, pos and neg go by the sign of A (see metrics.py).
TOKEN_SUMS = (
    "reweighted_pos", "reweighted_neg", "active_pos", "active_neg",  # counts
    "delta_pos", "delta_neg", "delta_squared",  # over re-weighted tokens
    "weight_pos", "weight_neg",  # A_hat / A over active tokens
    "weight_clip_low", "weight_clip_high",  # re-weighted tokens with sign(A) delta out of bounds
    "ratio_clip_low", "ratio_clip_high", "ratio_clip_dual",  # active tokens
    "kl", "entropy", "policy_kl",  # over active tokens; policy_kl is log P_old - log P_S
)
# Stands for log 0 where p = 0 multiplies it (a token that a bias of -inf forbids).
LOG_FLOOR = -1e30
# The least mass of the tail beside the top-k tokens of a distillation, TRL's.
TAIL_FLOOR = 1e-7


def compute_dtype(dtype):
    """The dtype in which inputs of `dtype` are computed: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_dtype(dtype):
    """Dtype of gradients formed before the upstream gradient is known: fp16 would flush those that
    a loss scale is about to lift."""
    return torch.float32 if dtype == torch.float16 else dtype


def capturing(x):
    """Whether a CUDA graph is being captured, when no number may come back to the host."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def trusted_rows(s):
    """False for NaN and for the row sums of a bad guess."""
    return (s >= ROW_SUM_BOUNDS[0]) & (s <= ROW_SUM_BOUNDS[1])


def constant_when_compiled(function):
    """torch.compiler.assume_constant_result without its import of Dynamo, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


def check_number(
    name, value, low=-math.inf, high=math.inf, *, low_open=False, high_open=False
):
    """Raise ValueError in one sentence unless value is a finite number in [low, high]."""
    ok = isinstance(value, Real) and not isinstance(value, bool)
    # Comparisons, not math.isfinite: torch.compile traces a changing float through them.
    ok = ok and -math.inf < value < math.inf and low <= value <= high
    if ok and not (low_open and value == low) and not (high_open and value == high):
        return
    closed = high < math.inf and not high_open
    bounds = f"{'(' if low_open else '['}{low:g}, {high:g}{']' if closed else ')'}"
    raise ValueError(f"{name} must be a finite number in {bounds}, but got {value!r}.")


@dataclass(frozen=True)
class RLSDLossConfig:
    """Scalars of the RLSD loss; hashable, and shared by every op and implementation.

    rlsd_lambda: mix of the token weight into the advantage, in [0, 1]; 0 is GRPO.
    rlsd_reweight_clip_range: eps_w in [0, 1]; the token weight stays in [1 - eps_w, 1 + eps_w].
    rlsd_delta_source: the student log-prob inside delta, "current" or "old_log_probs".
    rlsd_negative_only: re-weight only tokens whose advantage is negative.
    epsilon, epsilon_high: PPO clip, ratio kept in [1 - epsilon, 1 + epsilon_high].
    delta: dual clip, upper bound of the ratio where the advantage is negative; None turns it off.
    beta: coefficient of the k3 KL to a reference policy.
    entropy_coef: coefficient of an entropy bonus (nats); 0 turns it off.
    temperature: divides the logits of both contexts.

    Raises ValueError with one sentence on a value out of range.
    """

    rlsd_lambda: float = 0.5
    rlsd_reweight_clip_range: float = 0.2
    rlsd_delta_source: str = "current"
    rlsd_negative_only: bool = False
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = 3.0
    beta: float = 0.0
    entropy_coef: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        check_number("rlsd_lambda", self.rlsd_lambda, 0, 1)
        check_number("rlsd_reweight_clip_range", self.rlsd_reweight_clip_range, 0, 1)
        if self.rlsd_delta_source not in DELTA_SOURCES:
            raise ValueError(
                f"rlsd_delta_source must be one of {', '.join(DELTA_SOURCES)}, "
                f"but got {self.rlsd_delta_source!r}."
            )
        if not isinstance(self.rlsd_negative_only, bool):
            raise ValueError(
                f"rlsd_negative_only must be True or False, but got {self.rlsd_negative_only!r}."
            )
        check_number("epsilon", self.epsilon, 0, 1)
        check_number("epsilon_high", self.epsilon_high, 0)
        if self.delta is not None:
            check_number("delta (the dual clip, None turns it off)", self.delta, 1, low_open=True)
        check_number("beta", self.beta, 0)
        check_number("entropy_coef", self.entropy_coef, 0)
        check_number("temperature", self.temperature, 0, low_open=True)

    @property
    def log_weight_bounds(self):
        """Bounds of log w; at eps_w = 1 the lower one is -inf and only the upper one binds."""
        eps_w = self.rlsd_reweight_clip_range
        return math.log1p(-eps_w) if eps_w < 1 else -math.inf, math.log1p(eps_w)

    @property
    def log_ratio_bounds(self):
        """Log-ratio beyond which no gradient flows: blame below, praise above, blame above."""
        low = math.log1p(-self.epsilon) if self.epsilon < 1 else -MAX_LOG_RATIO
        dual = MAX_LOG_RATIO if self.delta is None else min(math.log(self.delta), MAX_LOG_RATIO)
        return low, math.log1p(self.epsilon_high), dual

    @property
    def token_bounds(self):
        """What kernels compare with: bounds of log w, of the log-ratio and of the ratio; beta."""
        blame_low, praise_high, blame_high = self.log_ratio_bounds
        return (
            *self.log_weight_bounds, blame_low, blame_high, praise_high, 1 - self.epsilon,
            1 + self.epsilon_high, math.inf if self.delta is None else float(self.delta),
            float(self.beta),
        )


def check_flags(**flags):
    """Raise TypeError in one sentence unless each is a bool: a tensor would be read as one."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, but got {type(value).__name__}.")


def check_config(config):
    """Raise TypeError in one sentence unless config is what the losses read."""
    if not isinstance(config, RLSDLossConfig):
        raise TypeError(
            f"config must be an RLSDLossConfig, but got {type(config).__name__}; leave it out for "
            "the defaults."
        )
