"""RLSD trainer: reinforcement learning with verifiable rewards and a privileged self-teacher."""

from rlsd_kernels import __version__

from .config import TrainConfig, UserError, make_config
from .options import load_yaml
from .policy.advantages import group_advantages, rlsd_lambda_at

__all__ = [
    "TrainConfig",
    "UserError",
    "__version__",
    "group_advantages",
    "load_yaml",
    "make_config",
    "rlsd_lambda_at",
]
