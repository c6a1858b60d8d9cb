"""Fused RLSD loss (arXiv 2604.03128) over the LM head; imports with torch alone."""

from .config import RLSDLossConfig
from .distillation import linear_distillation_loss
from .logprob import LinearLogProbsOutput, available_impls, linear_log_probs
from .loss import (
    FusedLinearRLSDLoss,
    RLSDLossOutput,
    aggregation_weights,
    fused_linear_rlsd_loss,
    rlsd_advantages,
    rlsd_loss,
)
from .metrics import merge_stats

__version__ = "0.1.0"
__all__ = [
    "FusedLinearRLSDLoss",
    "LinearLogProbsOutput",
    "RLSDLossConfig",
    "RLSDLossOutput",
    "aggregation_weights",
    "available_impls",
    "fused_linear_rlsd_loss",
    "linear_distillation_loss",
    "linear_log_probs",
    "merge_stats",
    "rlsd_advantages",
    "rlsd_loss",
]
