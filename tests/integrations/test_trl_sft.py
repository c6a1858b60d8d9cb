"""linear_log_probs as the head of SFTTrainer and DPOTrainer, against TRL's own fused head."""

import warnings

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from runs import problems, save_tiny
from transformers import TrainerCallback

trl = pytest.importorskip("trl", reason="the TRL integration needs trl: pip install '.[trl]'")

from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl_runs import OFF, make  # noqa: E402

from rlsd.integrations.trl_sft import use_fused_head  # noqa: E402
from rlsd.policy.checkpoint import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="TRL 1.14 has no fused head to replace"
)
ROWS = problems(24)
DATA = {
    SFTTrainer: [{"prompt": r["prompt"], "completion": " " + r["solution"]} for r in ROWS],
    DPOTrainer: [{"prompt": r["prompt"], "chosen": " " + r["solution"], "rejected": " # 3"}
                 for r in ROWS],
}
CONFIGS = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig}
METRICS = ("loss", "entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins")


def build(cls, folder, more=None, **changed):
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    args = CONFIGS[cls](**{
        "output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3,
        "logging_steps": 1, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant",
        "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True, **changed,
    })
    torch.manual_seed(0)
    return cls(
        str(folder / "model"), args=args, train_dataset=Dataset.from_list(DATA[cls]),
        processing_class=load_tokenizer(str(folder / "model")), **(more or {}),
    )


class Gradients(TrainerCallback):
    """Of each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([
            p.grad.flatten().clone() for p in model.parameters() if p.grad is not None
        ]))


def train(trainer):
    gradients = Gradients()
    trainer.add_callback(gradients)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return gradients.seen, trainer.state.log_history


def distance(ours, theirs):
    """Largest relative Frobenius distance of a step's gradient."""
    assert len(ours) == len(theirs) > 0
    return max((a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)).item()


CASES = {
    "sft": (SFTTrainer, {}),
    "dft": (SFTTrainer, {"loss_type": "dft"}),
    "sft-lora": (SFTTrainer, {"more": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}}),
    "dpo": (DPOTrainer, {}),
    "dpo-ipo": (DPOTrainer, {"loss_type": ["ipo"]}),
    "dpo-lora": (DPOTrainer, {"more": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}}),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_with_trls_head(folder, case, monkeypatch):
    cls, options = CASES[case]
    theirs, their_log = train(build(cls, folder, **options))
    trainer = build(cls, folder, **options)
    use_fused_head(trainer)
    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", None)
    ours, our_log = train(trainer)
    assert distance(ours, theirs) < 2e-5
    for got, want in zip(our_log[:3], their_log[:3], strict=True):
        names = [name for name in METRICS if name in want]
        assert len(names) >= 3
        for name in names:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name
    assert any(x["mean_token_accuracy"] > 0 for x in their_log[:3])


def test_gradient_tolerance(folder):
    results = []
    for tolerance in (0.0, 0.3):
        trainer = build(SFTTrainer, folder, max_steps=1)
        use_fused_head(trainer, gradient_tolerance=tolerance)
        results.append(train(trainer))
    assert 1e-3 < distance(results[1][0], results[0][0]) < 0.3
    assert results[1][1][0]["loss"] == results[0][1][0]["loss"]


def test_refuses_in_a_sentence(folder):
    trainer, _ = make(GRPOTrainer, folder, **OFF)
    weighted = build(DPOTrainer, folder, use_weighting=True)
    for given, options, complaint in (
        (trainer, {}, "trainer must be an SFTTrainer or a DPOTrainer, but is a GRPOTrainer"),
        (weighted, {}, "use_weighting"),
        (build(SFTTrainer, folder), {"gradient_tolerance": 1.0}, "gradient_tolerance"),
    ):
        with pytest.raises(ValueError, match=complaint) as error:
            use_fused_head(given, **options)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
