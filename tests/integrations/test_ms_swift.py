"""The plugin in `swift rlhf`: loss and gradients against ms-swift's own, and what it refuses."""

import json
import logging
import sys

import pytest
import torch

pytest.importorskip("swift", reason="needs ms-swift 4.6: tests/integrations/run_ms_swift.sh")

import swift  # noqa: E402
from swift.pipelines.train.rlhf import SwiftRLHF  # noqa: E402
from swift.rewards import ORM, orms  # noqa: E402
from swift.rlhf_trainers import GRPOTrainer  # noqa: E402
from swift.trainers import TrainerFactory  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from rlsd.config import UserError  # noqa: E402
from rlsd.demo import save_model, tiny_model, word_tokenizer  # noqa: E402
from rlsd.integrations import ms_swift  # noqa: E402

TOLERANCE = 1e-5
WORDS = ["user", "assistant", "system", "<q>", "<h>", *map(str, range(10))]
OWN = "rlsd.integrations.ms_swift.RLSDGRPOTrainer"
THEIRS = "swift.rlhf_trainers.GRPOTrainer"
# Two optimizer steps per rollout, each of two micro-batches, read twice: ratios leave 1.
REUSED = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2,
          "max_steps": 4}


class SumReward(ORM):
    """Five values, unrelated to the text, so that groups nearly always have signal."""

    def __call__(self, completions, **columns):
        return [sum(map(ord, text)) % 5 / 4 for text in completions]


orms["sum"] = SumReward


def row(i, **changed):
    return {"messages": [{"role": "user", "content": f"<q> {i % 10} {'3 ' * (i % 4)}"}],
            "teacher_prompt": f"<q> {i % 10} <h> {i % 7}", **changed}


PLAIN = {"advantage_reweight": None, "rows": [{"messages": row(i)["messages"]} for i in range(12)]}


class Recorder(TrainerCallback):
    """Micro-batch losses, gradients of optimizer steps, completions, and calls of the LM head."""

    def __init__(self, trainer):
        self.trainer, self.losses, self.gradients, self.ids = trainer, [], [], []
        self.heads, self.teachers = 0, 0
        compute, score = trainer.compute_loss, trainer._compute_teacher_logps

        def compute_loss(model, inputs, *args, **kwargs):
            self.heads = 0
            loss = compute(model, inputs, *args, **kwargs)
            self.losses.append(loss.item())
            self.ids.append(inputs["model_inputs"]["input_ids"])
            return loss

        def compute_teacher(*args, **kwargs):
            out = score(*args, **kwargs)
            self.teachers += out is not None
            return out

        def count(*_):
            self.heads += 1

        trainer.compute_loss, trainer._compute_teacher_logps = compute_loss, compute_teacher
        base = trainer.accelerator.unwrap_model(trainer.model)
        base.get_output_embeddings().register_forward_hook(count)
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([
            p.grad.flatten().clone() for p in model.parameters() if p.grad is not None
        ]))

    def history(self, name):
        return [r[name] for r in self.trainer.state.log_history if name in r]


@pytest.fixture
def run(folder, monkeypatch):
    """run(trainer class path, rows=..., **options) trains a tiny model and returns its Recorder."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if not (folder / "model").exists():
        tokenizer = word_tokenizer(WORDS)
        tokens = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        tokenizer.add_special_tokens(tokens)
        model = tiny_model(len(tokenizer), seed=3, hidden=16, layers=1)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p *= 5  # sharper, so that the hint matters
        save_model(model, tokenizer, folder / "model")
        (folder / "rlsd_plugin.py").write_text("import rlsd.integrations.ms_swift  # noqa: F401\n")
    recorders, train = [], SwiftRLHF.train

    def recorded(self, trainer):
        recorders.append(Recorder(trainer))
        return train(self, trainer)

    monkeypatch.setattr(SwiftRLHF, "train", recorded)

    def start(trainer=OWN, rows=None, **changed):
        data = folder / "train.jsonl"
        rows = [row(i) for i in range(12)] if rows is None else rows
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        options = {
            "rlhf_type": "grpo", "model": folder / "model", "model_type": "qwen3",
            "template": "qwen3", "dataset": data, "output_dir": folder / "out",
            "external_plugins": folder / "rlsd_plugin.py", "reward_funcs": "sum",
            "advantage_reweight": "rlsd", "torch_dtype": "float32", "bf16": False, "fp16": False,
            "tuner_type": "full", "per_device_train_batch_size": 4, "num_generations": 4,
            "max_completion_length": 6, "max_steps": 2, "learning_rate": 0.05, "optim": "sgd",
            "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "beta": 0.0, "use_vllm": False,
            "report_to": "none", "logging_steps": 1, "save_strategy": "no", "seed": 7,
            "gradient_checkpointing": False, "check_model": False, "split_dataset_ratio": 0.0,
            "load_from_cache_file": False, "dataset_num_proc": 1, "dataloader_num_workers": 0,
            **changed,
        }
        if options["advantage_reweight"] is None:
            del options["advantage_reweight"]
        pipeline = SwiftRLHF([x for k, v in options.items() for x in (f"--{k}", str(v))])
        monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "grpo", trainer)
        pipeline.main()
        return recorders.pop()

    return start


def assert_parity(run, **options):
    """Same samples; losses and gradients equal to TOLERANCE of their size; our Recorder."""
    want, got = run(THEIRS, **options), run(**options)
    assert type(want.trainer) is GRPOTrainer and type(got.trainer).__name__ == "RLSDGRPOTrainer"
    assert len(got.losses) == len(want.losses) > 0 and len(got.gradients) == len(want.gradients) > 0
    for a, b in zip(got.ids, want.ids, strict=True):
        assert torch.equal(a, b), "the runs sampled differently"
    a, b = (torch.tensor(r.losses, dtype=torch.float64) for r in (got, want))
    loss = ((a - b).abs().max() / b.abs().max()).item()
    gradient = max(
        ((x - y).norm() / y.norm()).item()
        for x, y in zip(got.gradients, want.gradients, strict=True)
    )
    print(f"parity: relative error of loss {loss:.1e}, gradient {gradient:.1e}")
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)
    assert got.heads == 0 and want.heads == 1  # no (B, T, V) logits in the last loss
    theirs = {k for r in want.trainer.state.log_history for k in r}
    ours = {k for r in got.trainer.state.log_history for k in r}
    assert theirs - ours <= {"rlsd_lambda", "teacher_kl"}  # without a teacher at lambda 0
    for name in sorted(n for n in theirs if n.startswith(("clip_ratio", "kl", "reward", "sdar"))):
        assert got.history(name) == pytest.approx(want.history(name), rel=1e-4, abs=1e-6), name
    return got


LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo"]


@pytest.mark.parametrize("method", [{}, PLAIN], ids=["rlsd", "grpo"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_fused_loss_is_ms_swifts(run, loss_type, method):
    got = assert_parity(run, loss_type=loss_type, epsilon=0.05, epsilon_high=0.08, **REUSED,
                        **method)
    assert got.trainer.obstacle is None
    assert max(got.history("clip_ratio/region_mean")) > 0
    assert method or max(got.history("rlsd/clip_low_frac")) > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_lambda_zero_is_ms_swifts_grpo(run, loss_type):
    want = run(THEIRS, loss_type=loss_type, **PLAIN, **REUSED)
    rows = PLAIN["rows"] if loss_type == "grpo" else None  # without a column for the teacher, too
    got = run(loss_type=loss_type, rlsd_lambda=0.0, rows=rows, **REUSED)
    assert got.teachers == 0 and want.losses == pytest.approx(got.losses, rel=1e-5, abs=1e-6)
    for a, b in zip(got.gradients, want.gradients, strict=True):
        assert ((a - b).norm() / b.norm()).item() < TOLERANCE


FUSED = {
    # Rollouts before steps 0, 4 and 8: lambda 0, 0.375, 0.125.
    "schedule": {"rlsd_lambda_warmup_steps": 2, "rlsd_lambda_decay_steps": 8, "max_steps": 9},
    "full-weight": {"rlsd_lambda": 1.0, "rlsd_reweight_clip_range": 1.0},
    "negative-only": {"rlsd_negative_only": True},
    "temperature": {"temperature": 0.7},
    "dual-clip": {"delta": 1.1, "epsilon_high": 0.05},
    "overlong-filter": {"overlong_filter": True},
    "batch-scale": {"scale_rewards": "batch"},
    "opd-rl": {"advantage_reweight": None},  # ms-swift adds coef * delta to A of each token
    "lora": {"tuner_type": "lora", "target_modules": "all-linear"},
    "one-token": {"max_completion_length": 1},
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
def test_options_of_the_fused_loss(run, options):
    got = assert_parity(run, **{**REUSED, **options})
    assert got.trainer.obstacle is None
    assert "delta" not in options or max(got.history("clip_ratio/dual_mean")) > 0


def test_frozen_teacher(run, folder):
    got = assert_parity(run, teacher_model=folder / "model", teacher_model_type="qwen3", **REUSED)
    assert got.trainer.teacher_model is not None and got.trainer.obstacle is None


OWN_FORMULA = {
    "loss_type": {"loss_type": "cispo", "epsilon_high": 2.0},
    "importance_sampling_level": {"importance_sampling_level": "sequence"},
    "beta, whose KL ms-swift clamps": {"beta": 0.3},
    # The first tokens of a group tie in entropy: a quantile away from them, or rounding decides.
    "entropies of all tokens": {"log_entropy": True, "top_entropy_quantile": 0.2},
    "delta below 1 + epsilon_high": {"delta": 1.05},
    "sdar_loss_coef": {"sdar_loss_coef": 0.5, "advantage_reweight": None},
}


@pytest.mark.parametrize("name", OWN_FORMULA)
def test_other_losses_run_ms_swifts_formula_on_fused_log_probs(run, name, caplog):
    logging.getLogger("swift").propagate = True
    caplog.set_level(logging.INFO)
    got = assert_parity(run, **{**REUSED, **OWN_FORMULA[name]})
    assert got.trainer.obstacle == name
    assert f"the loss is ms-swift's on them because of {name}." in caplog.text


@pytest.mark.parametrize("options", [{}, {"loss_type": "cispo", "epsilon_high": 2.0}],
                         ids=["one-pass", "formula"])
def test_gradient_tolerance(run, options, monkeypatch):
    results = []
    for tolerance in (0.0, 0.3):
        monkeypatch.setattr(ms_swift.RLSDGRPOTrainer, "gradient_tolerance", tolerance)
        results.append(run(max_steps=1, **options))
    exact, got = (r.gradients[0] for r in results)
    assert results[0].losses == results[1].losses
    assert 1e-3 < ((got - exact).norm() / exact.norm()).item() < 0.3


def test_a_bad_gradient_tolerance_is_refused(run, monkeypatch):
    monkeypatch.setattr(ms_swift.RLSDGRPOTrainer, "gradient_tolerance", 1.0)
    with pytest.raises(ValueError, match="gradient_tolerance must be") as error:
        run()
    one_sentence(error)


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, text


@pytest.mark.parametrize("rows, missing", [
    ([{"messages": row(0)["messages"]}] * 12, 0),
    ([row(i, teacher_prompt=None if i == 3 else "<h> 1") for i in range(12)], 3),
], ids=["no-column", "empty-row"])
def test_a_missing_teacher_prompt_is_refused_at_construction(run, rows, missing):
    with pytest.raises(UserError, match=f"row {missing} of the dataset has no teacher_p") as error:
        run(rows=rows, dataset_shuffle=False)
    one_sentence(error)


def test_a_missing_teacher_prompt_in_a_stream_is_refused_as_it_comes(run):
    rows = [row(i, teacher_prompt="" if i == 3 else "<h> 1") for i in range(12)]
    with pytest.raises(UserError, match="^The row with messages .* has no teacher_prompt") as error:
        run(rows=rows, streaming=True, max_steps=6, dataset_shuffle=False)
    one_sentence(error)


def test_a_wide_clip_range_is_refused(run):
    with pytest.raises(ValueError, match="rlsd_reweight_clip_range must be .* but got 1.5"):
        run(rlsd_reweight_clip_range=1.5)


def test_liger_is_refused(run, monkeypatch):
    init = GRPOTrainer.__init__

    def with_liger(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.args.use_liger_kernel = True

    monkeypatch.setattr(GRPOTrainer, "__init__", with_liger)
    with pytest.raises(UserError, match="use_liger_kernel puts Liger's loss in its place") as error:
        run()
    one_sentence(error)


def test_installation_is_announced_and_other_versions_are_refused(monkeypatch, caplog):
    logging.getLogger("swift").propagate = True
    caplog.set_level(logging.INFO)
    name = "rlsd.integrations.ms_swift"
    monkeypatch.delitem(sys.modules, name, raising=False)
    __import__(name)
    assert f"RLSD: GRPO trains with {OWN} instead of ms-swift's." in caplog.text
    assert TrainerFactory.TRAINER_MAPPING["grpo"] == OWN
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(swift, "__version__", "4.7.0")
    with pytest.raises(UserError, match="ms-swift 4.6.x, but 4.7.0 is installed") as error:
        __import__(name)
    assert "\n" not in str(error.value)
