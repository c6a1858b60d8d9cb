"""linear_log_probs as the head of TRL's SFTTrainer and DPOTrainer.

    trainer = SFTTrainer(model, args=args, train_dataset=train_dataset)
    use_fused_head(trainer)
    trainer.train()
"""

from ..packages import require_release

for host in ("trl", "transformers"):  # first: of another release the imports below may fail
    require_release(host)

import trl
from packaging.version import Version
from trl import DPOTrainer, SFTTrainer

from rlsd_kernels.config import check_number

from ..config import UserError
from ..policy.models import head_of
from .head import add_rlsd_head, answer_trl, base_of


def use_fused_head(trainer, *, impl="auto", gradient_tolerance=0.0):
    """Let a trainer's passes score tokens by linear_log_probs instead of TRL's own fused head.

    The loss stays TRL's, on log-probs and entropies from fp32 logits; token accuracy and mean
    logits, its metrics, come from the same pass. Call it before train().

    Args:
        trainer: SFTTrainer, or DPOTrainer without use_weighting; PEFT models and any loss_type.
        impl, gradient_tolerance: of linear_log_probs.

    Raises: UserError (a ValueError), in one sentence, on what it cannot serve.
    """
    check_number("gradient_tolerance", gradient_tolerance, 0, 1, high_open=True)
    if not isinstance(trainer, SFTTrainer | DPOTrainer):
        raise UserError(
            f"trainer must be an SFTTrainer or a DPOTrainer, but is a {type(trainer).__name__}; "
            "RLSDTrainer has the fused head already."
        )
    plugin = trainer.args.deepspeed_plugin
    parallel = trainer.accelerator.parallelism_config
    for applies, why in (
        (Version(trl.__version__) < Version("1.15"),
         f"TRL {trl.__version__} has no fused head to replace; install 1.15 or later"),
        (isinstance(trainer, DPOTrainer) and trainer.use_weighting,
         "use_weighting reads the sum of squared probabilities; turn it off"),
        (parallel is not None and (parallel.cp_enabled or parallel.sp_enabled),
         "context and sequence parallelism shift the labels themselves; turn them off"),
        (plugin is not None and plugin.zero_stage == 3,
         "ZeRO-3 partitions the head; use another stage"),
    ):
        if applies:
            raise UserError(f"The fused head cannot stand in because {why}.")
    policy = base_of(trainer.model)
    scale = head_of(policy)
    for model in (policy, getattr(trainer, "ref_model", None)):
        if model is not None:
            model = trainer.accelerator.unwrap_model(model)
            add_rlsd_head(model, cast_lm_head_to_fp32=False)
            answer_trl(model, scale, temperature=1.0, impl=impl, metrics=model is policy,
                       gradient_tolerance=gradient_tolerance)
