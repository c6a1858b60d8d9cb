"""RLSDConfig: TRL's GRPOConfig with the options of RLSD, each checked once."""

import math
from dataclasses import dataclass
from typing import ClassVar

from trl import GRPOConfig

from rlsd_kernels import RLSDLossConfig
from rlsd_kernels.config import check_number

from ..config import DEFAULT_PRIVILEGED_TEMPLATE, TEACHER_MODEL_KINDS
from ..objectives import OBJECTIVES
from ..options import UserError, option


@dataclass
class RLSDConfig(GRPOConfig):
    """GRPOConfig plus the options of RLSD; steps are rollouts, counted from 1.

    The loss keeps TRL's options and defaults; the paper clips with epsilon_high=0.28, delta=3.0.
    Source: arXiv 2604.03128. Raises ValueError in one sentence on a bad value.
    """

    rlsd_lambda: float = option(0.5, "Mix of the token weight into the advantage; 0 is GRPO.")
    rlsd_lambda_warmup_steps: int = option(0, "Rollouts over which lambda rises from 0.")
    rlsd_lambda_decay_steps: int = option(50, "Rollouts over which it falls to 0; 0 keeps it.")
    rlsd_reweight_clip_range: float = option(0.2, "Token weights stay in 1 -+ this, 0 to 1.")
    rlsd_delta_source: str = option("current", "Student in delta: `current` or `old_log_probs`.")
    rlsd_negative_only: bool = option(False, "Re-weight only where the advantage is negative.")
    objective: str = option("rlsd", "`rlsd`, or `rlcsd`, which adds a contrast to A.")
    hint_source: str = option("data", "`data`, or `rollout`: a right completion of the group.")
    success_reward_threshold: float = option(1.0, "Completions of this reward are right hints.")
    rlsd_contrast_hints: int | None = option(
        None, "Up to so many wrong completions of the group, against which the hint is held in "
        "place of the student; default: 4 for rlcsd, else 0.",
    )
    rlcsd_beta: float = option(
        1.0, "rlcsd adds r = clip(beta lambda tanh(e / tau), -c, c) to A, e the contrast."
    )
    rlcsd_tau: float = option(0.02, "tau of rlcsd, in nats.")
    rlcsd_clip: float = option(2.0, "c of rlcsd.")
    rlcsd_threshold: float = option(0.02, "rlcsd adds r to A where |r| is above this, selected.")
    rlcsd_eta: float = option(1.0, "Weight of the mean over selected tokens beside the others'.")
    rlsd_impl: str = option("auto", "Implementation of the fused loss.")
    gradient_tolerance: float = option(
        0.0, "Relative error that the gradient at the logits may have, in [0, 1); 0 is exact."
    )
    share_prompts: str = option(
        "auto", "Compute a prompt once for the rows of a micro-batch that have it: `auto`, where "
        "the model proves to give the same, `true` or `false`.",
    )
    teacher_model_kind: str = option("snapshot", "`live`, `base`, `snapshot` or `ema`.")
    teacher_sync_steps: int = option(10, "A snapshot teacher follows after so many rollouts.")
    teacher_ema_rate: float = option(0.05, "An ema teacher moves this share per rollout.")
    privileged_template: str = option(DEFAULT_PRIVILEGED_TEMPLATE, "Makes the teacher's prompt.")
    hint_placement: str = option(
        "text", "`text`: privileged_template inserts the hint; `turn`: one more exchange before "
        "the last user turn, the same question solved by it.",
    )
    allow_missing_privileged_context: bool = option(False, "Rows without one train as plain GRPO.")

    max_teacher_prompt_length: ClassVar = None  # policy/hints.py asks; TRL bounds no prompt

    def __post_init__(self):
        super().__post_init__()
        if self.rlsd_contrast_hints is None:
            self.rlsd_contrast_hints = 4 if self.objective == "rlcsd" else 0
        self.loss_config()
        check_number("gradient_tolerance", self.gradient_tolerance, 0, 1, high_open=True)
        kinds, template = TEACHER_MODEL_KINDS, self.privileged_template
        for name, rule, holds in (
            ("rlsd_lambda_warmup_steps", "at least 0", self.rlsd_lambda_warmup_steps >= 0),
            ("rlsd_lambda_decay_steps", "at least 0", self.rlsd_lambda_decay_steps >= 0),
            ("teacher_sync_steps", "at least 1", self.teacher_sync_steps >= 1),
            ("teacher_ema_rate", "in (0, 1]", 0 < self.teacher_ema_rate <= 1),
            ("teacher_model_kind", f"one of {', '.join(kinds)}", self.teacher_model_kind in kinds),
            ("objective", "rlsd or rlcsd", self.objective in ("rlsd", "rlcsd")),
            ("hint_source", "data or rollout", self.hint_source in ("data", "rollout")),
            ("success_reward_threshold", "finite", math.isfinite(self.success_reward_threshold)),
            ("rlsd_contrast_hints", "at least 1 for rlcsd, else at least 0",
             self.rlsd_contrast_hints >= (self.objective == "rlcsd")),
            *((name, "finite and above 0", 0 < getattr(self, name) < math.inf)
              for name in ("rlcsd_beta", "rlcsd_tau", "rlcsd_clip", "rlcsd_eta")),
            ("rlcsd_threshold", "at least 0", 0 <= self.rlcsd_threshold < math.inf),
            ("share_prompts", "one of auto, true, false",
             self.share_prompts in ("auto", "true", "false")),
            ("hint_placement", "text or turn", self.hint_placement in ("text", "turn")),
            ("privileged_template", "a text with {prompt} and {privileged_context} once each",
             template.count("{prompt}") == template.count("{privileged_context}") == 1),
        ):
            if not holds:
                raise UserError(f"{name} must be {rule}, but got {getattr(self, name)!r}.")
        if self.hint_placement == "turn" and template != DEFAULT_PRIVILEGED_TEMPLATE:
            raise UserError("privileged_template is for hint_placement text, but hint_placement is "
                            "turn, which adds the hint as it is; leave one of them out.")

    @property
    def method(self):
        """The row of OBJECTIVES."""
        return OBJECTIVES[self.objective]

    def reads_siblings(self):
        """Whether a teacher reads completions of the group that it scores."""
        from_group = self.hint_source == "rollout" or self.rlsd_contrast_hints > 0
        return from_group and self.rlsd_lambda > 0

    def loss_config(self):
        """The scalars of the fused loss."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        delta = None if self.delta is None or self.delta < 1 + high else self.delta
        return RLSDLossConfig(
            self.rlsd_lambda, self.rlsd_reweight_clip_range, self.rlsd_delta_source,
            self.rlsd_negative_only, self.epsilon, high, delta, self.beta, 0.0, self.temperature,
        )
