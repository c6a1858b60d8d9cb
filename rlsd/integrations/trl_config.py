"""RLSDConfig: TRL's GRPOConfig with the options of RLSD, each checked once."""

from dataclasses import dataclass

from trl import GRPOConfig

from rlsd_kernels import RLSDLossConfig
from rlsd_kernels.config import check_number

from ..config import DEFAULT_PRIVILEGED_TEMPLATE, TEACHER_MODEL_KINDS
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
        "text", "`text`: privileged_template inserts the hint; `turn`: one more exchange before the "
        "last user turn, the same question solved by it.",
    )
    allow_missing_privileged_context: bool = option(False, "Rows without one train as plain GRPO.")

    def __post_init__(self):
        super().__post_init__()
        self.loss_config()
        check_number("gradient_tolerance", self.gradient_tolerance, 0, 1, high_open=True)
        kinds, template = TEACHER_MODEL_KINDS, self.privileged_template
        for name, rule, holds in (
            ("rlsd_lambda_warmup_steps", "at least 0", self.rlsd_lambda_warmup_steps >= 0),
            ("rlsd_lambda_decay_steps", "at least 0", self.rlsd_lambda_decay_steps >= 0),
            ("teacher_sync_steps", "at least 1", self.teacher_sync_steps >= 1),
            ("teacher_ema_rate", "in (0, 1]", 0 < self.teacher_ema_rate <= 1),
            ("teacher_model_kind", f"one of {', '.join(kinds)}", self.teacher_model_kind in kinds),
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

    def loss_config(self):
        """The scalars of the fused loss."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        delta = None if self.delta is None or self.delta < 1 + high else self.delta
        return RLSDLossConfig(
            self.rlsd_lambda, self.rlsd_reweight_clip_range, self.rlsd_delta_source,
            self.rlsd_negative_only, self.epsilon, high, delta, self.beta, 0.0, self.temperature,
        )
