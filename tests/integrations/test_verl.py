"""The verl hook on the CPU: fused head, estimator, teacher pass and verl's own actor update."""

import copy
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="needs verl 0.9: tests/integrations/run_verl.sh")

import transfer_queue  # noqa: E402
import verl  # noqa: E402
from cpu_platform import PlatformCPU  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf, open_dict  # noqa: E402
from transfer_queue import KVBatchMeta  # noqa: E402
from verl.plugin.platform.platform_manager import set_platform  # noqa: E402

set_platform(PlatformCPU())  # before the modules that read the device's name
from verl.models.transformers import dense_common, monkey_patch  # noqa: E402

THEIRS = {"torch": dense_common.forward_with_torch_backend,
          "triton": dense_common.forward_with_triton_backend}

from transformers import Qwen3ForCausalLM  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.trainer.ppo import core_algos, ray_trainer  # noqa: E402
from verl.trainer.ppo.v1 import trainer_base, utils  # noqa: E402
from verl.utils import config as verl_config  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.model import update_model_config  # noqa: E402
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from rlsd.config import UserError  # noqa: E402
from rlsd.demo import save_model, tiny_model, word_tokenizer  # noqa: E402
from rlsd.integrations import verl as hook  # noqa: E402
from rlsd.integrations import verl_teacher  # noqa: E402
from rlsd_kernels import rlsd_advantages  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
B, P, T = 8, 6, 5
WORDS = ["<q>", "<h>", "<a>", *map(str, range(10))]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}" \
       "{% if add_generation_prompt %}<a>{% endif %}"
EngineRegistry.register(
    model_type="language_model", backend=["fsdp2"], device=["cpu"]
)(FSDPEngineWithLMHead)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, text


def sharp_model(seed=3):
    model = tiny_model(len(WORDS) + 3, seed=seed, hidden=16, layers=1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 5
    return model


def scored(model, forward, ids, upstream, **options):
    """log-probs, entropy and all gradients under two upstream gradients."""
    model = copy.deepcopy(model)
    out = forward(model, input_ids=ids, return_dict=True, use_cache=False, **options)
    total = (out.log_probs * upstream[0]).sum() + (out.entropy * upstream[1]).sum()
    grads = torch.autograd.grad(total, list(model.parameters()))
    return out.log_probs.detach(), out.entropy.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7}, {"shift_labels": True}, {"labels": True},
], ids=["plain", "temperature", "shift-labels", "labels"])
def test_fused_head_is_verls_torch_backend(options):
    model, ids = sharp_model(), torch.randint(3, 16, (3, 9))
    for name in {"shift_labels", "labels"} & options.keys():
        options = {name: torch.randint(3, 16, (3, 9))}
    upstream = torch.randn(2, 3, 9)
    want = scored(model, THEIRS["torch"], ids, upstream, **options)
    got = scored(model, dense_common.forward_with_torch_backend, ids, upstream, **options)
    errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
    print("parity: relative error of log-probs {:.1e}, entropy {:.1e}, gradient {:.1e}".format(
        *errors))
    assert max(errors) < TOLERANCE and got[0].dtype == got[1].dtype == torch.float32


def test_gradient_tolerance():
    """An entry of the model's override_config, which verl writes into the model's config."""
    model, ids, upstream = sharp_model(), torch.randint(3, 16, (3, 9)), torch.randn(2, 3, 9)
    forward, results = dense_common.forward_with_torch_backend, []
    for tolerance in (0.0, 0.3):
        update_model_config(model.config, {"rlsd_gradient_tolerance": tolerance})
        results.append(scored(model, forward, ids, upstream))
    assert all(torch.equal(*pair) for pair in zip(results[0][:2], results[1][:2], strict=True))
    assert 1e-3 < relative(results[1][2], results[0][2]) < 0.3
    update_model_config(model.config, {"rlsd_gradient_tolerance": 1.0})
    with pytest.raises(ValueError, match="gradient_tolerance must be") as error:
        scored(model, forward, ids, upstream)
    one_sentence(error)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_verl_installs_it_for_either_backend(backend, monkeypatch):
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)
    model = sharp_model()
    monkey_patch.patch_forward_with_backends(model, True, backend)
    assert Qwen3ForCausalLM.forward is hook.fused_forward
    assert THEIRS[backend] is not hook.fused_forward


def test_bias_scale_and_softcap_are_honoured():
    model, ids = sharp_model(), torch.randint(3, 16, (3, 9))
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    model.config.final_logit_softcapping, model.config.logit_scale = 3.0, 0.5
    out = hook.fused_forward(model, input_ids=ids, return_dict=True, temperature=0.7)
    logits = 3 * torch.tanh(0.5 * model.lm_head(model.model(ids).last_hidden_state) / 3) / 0.7
    want = logits.log_softmax(-1)
    got = want.gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs, got, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, -(want.exp() * want).sum(-1), rtol=1e-5, atol=1e-5)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="needs a torch.nn.Linear") as error:
        hook.fused_forward(model, input_ids=ids, return_dict=True)
    one_sentence(error)


def rollout(rewards=None):
    """A batch as verl's fit has it before old_log_probs: left-padded prompts, ragged responses."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 16, (B, P + T), generator=rng)
    mask = torch.ones(B, P + T, dtype=torch.int64)
    for i in range(B):
        mask[i, : i % 4], mask[i, P + T - i % 3 :] = 0, 0
    rewards = torch.tensor([0.9] * 3 + [0.0, 1.0, 0.5, 0.25, 1.0]) if rewards is None else rewards
    token_rewards = torch.zeros(B, T)
    token_rewards[:, 0] = rewards
    prompts = [[{"role": "user", "content": f"<q> {i} <h> {3 * i % 7}"}] for i in range(B)]
    return verl.DataProto.from_dict({
        "prompts": ids[:, :P], "responses": ids[:, P:], "input_ids": ids, "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "response_mask": mask[:, P:],
        "token_level_rewards": token_rewards,
    }, non_tensors={
        "uid": np.array(["a"] * 3 + ["b"] * 5, dtype=object),
        "extra_info": np.array([{"teacher_prompt": p} for p in prompts], dtype=object),
    }, meta_info={"temperature": 1.0, "global_token_num": mask.sum(-1).tolist()})


def algorithm(**changed):
    return OmegaConf.create({"adv_estimator": "rlsd", "gamma": 1.0, "lam": 1.0,
                             "norm_adv_by_std_in_grpo": True, **changed})


def advantages(data, **changed):
    config = algorithm(**changed)
    return ray_trainer.compute_advantage(
        data, adv_estimator=config.adv_estimator, gamma=1.0, lam=1.0, num_repeat=4,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo, config=config,
    ).batch["advantages"]


@pytest.mark.parametrize("options", [
    {}, {"rlsd_lambda": 1.0, "rlsd_reweight_clip_range": 0.5}, {"rlsd_negative_only": True},
    {"norm_adv_by_std_in_grpo": False},
], ids=["default", "full-weight", "negative-only", "unscaled"])
def test_estimator_is_rlsd_advantages_of_verls_grpo(options):
    data = rollout()
    data.batch["old_log_probs"] = torch.randn(B, T) - 2
    data.batch["teacher_log_probs"] = torch.randn(B, T) - 2
    grpo = advantages(copy.deepcopy(data), **{**options, "adv_estimator": "grpo"})
    assert 0 < grpo[:3].abs().max() < 0.1  # what verl makes of three rewards of 0.9
    grpo[:3] = 0
    want = rlsd_advantages(
        grpo, data.batch["old_log_probs"], data.batch["teacher_log_probs"],
        reweight_mask=data.batch["response_mask"].bool(),
        **{k: v for k, v in options.items() if k.startswith("rlsd_")},
    )
    got = advantages(data, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert (got != grpo).any() and torch.equal(got.sign(), grpo.sign())
    assert torch.equal(data.batch["returns"], got)


def test_lambda_zero_is_verls_grpo():
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.0, 1.0])
    want = advantages(rollout(rewards=rewards), adv_estimator="grpo")
    data = rollout(rewards=rewards)
    data.batch["old_log_probs"] = torch.randn(B, T)
    assert torch.equal(advantages(data, rlsd_lambda=0.0), want)


def test_missing_teacher_log_probs_are_refused():
    data = rollout()
    data.batch["old_log_probs"] = torch.randn(B, T)
    with pytest.raises(UserError, match="needs teacher_log_probs and old_log_probs") as error:
        advantages(data)
    one_sentence(error)
    estimate = core_algos.get_adv_estimator_fn("rlsd")  # as a trainer without the wrapper calls it
    with pytest.raises(UserError, match="needs teacher_log_probs"):
        estimate(token_level_rewards=data.batch["token_level_rewards"], config=algorithm(),
                 response_mask=data.batch["response_mask"], index=data.non_tensor_batch["uid"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One process as its own cluster; gives a folder with a model."""
    folder, threads = tmp_path_factory.mktemp("verl"), torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = CHAT
    save_model(sharp_model(), tokenizer, folder / "model")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1",
                   "LOCAL_RANK": "0"}
    os.environ.update(environment)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    yield folder
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


def make_trainer(folder, monkeypatch, fused, **changed):
    """RayPPOTrainer's methods over verl's own worker in this process, without Ray."""
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)
    precision = {f"{name}_dtype": "fp32" for name in ("param", "reduce", "buffer")}
    worker = TrainingWorker(TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(folder / "model"), use_remove_padding=False, use_fused_kernels=fused,
            fused_kernel_options={"impl_backend": "torch"}, enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", dtype="float32", mixed_precision=precision, use_torch_compile=False,
            use_dynamic_bsz=False, micro_batch_size_per_gpu=2, infer_micro_batch_size_per_gpu=4,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=4),
        checkpoint_config=CheckpointConfig(),
    ))
    worker.reset()
    actor = FSDPActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_mini_batch_size=2, ppo_micro_batch_size_per_gpu=2,
        optim=FSDPOptimizerConfig(lr=1e-3),
    )
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    worker.profiler.step = lambda: None
    config = OmegaConf.create({
        "algorithm": algorithm(**changed), "data": {},
        "actor_rollout_ref": {
            "rollout": {"temperature": 1.0, "n": 4, "multi_turn": {"enable": False}},
            "actor": {"calculate_entropy": True, "entropy_coeff": 0.0, "ppo_mini_batch_size": 2,
                      "ppo_epochs": 1, "data_loader_seed": 1, "shuffle": False},
        },
    })
    group = types.SimpleNamespace(
        compute_log_prob=worker.infer_batch, update_actor=worker.train_mini_batch
    )
    return types.SimpleNamespace(
        config=config, actor_rollout_wg=group, tokenizer=worker.model_config.tokenizer,
        global_steps=1, worker=worker,
    )


def naive_log_probs(model, prompt, response):
    hidden = model.model(torch.tensor([prompt + response])).last_hidden_state
    logits = model.lm_head(hidden[0, len(prompt) - 1 : -1])
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def step(trainer, batch):
    """What RayPPOTrainer.fit does between rewards and the next rollout; the actor's metrics."""
    methods = ray_trainer.RayPPOTrainer
    old, _ = methods._compute_old_log_prob(trainer, batch)
    batch = batch.union(old)
    config = trainer.config.algorithm
    batch = ray_trainer.compute_advantage(
        batch, adv_estimator=config.adv_estimator, gamma=1.0, lam=1.0, num_repeat=4,
        norm_adv_by_std_in_grpo=True, config=config,
    )
    return batch, methods._update_actor(trainer, batch).meta_info["metrics"]


def test_a_step_of_verls_actor_is_rlsd(cluster, monkeypatch):
    trainer = make_trainer(cluster, monkeypatch, fused=True)
    model, batch = sharp_model(), rollout()
    assert Qwen3ForCausalLM.forward is hook.fused_forward
    start = {n: p.full_tensor().clone() for n, p in trainer.worker.engine.module.named_parameters()}
    batch, metrics = step(trainer, batch)
    data, total, tokens = batch.batch, 0.0, batch.batch["response_mask"].sum()
    for i in range(B):
        live = data["response_mask"][i].bool()
        response = data["responses"][i][live].tolist()
        prompt = data["prompts"][i][data["attention_mask"][i, :P].bool()].tolist()
        chat = batch.non_tensor_batch["extra_info"][i]["teacher_prompt"]
        text = trainer.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        student = naive_log_probs(model, prompt, response)
        teacher = naive_log_probs(model, trainer.tokenizer(text)["input_ids"], response).detach()
        for got, want in (("old_log_probs", student.detach()), ("teacher_log_probs", teacher)):
            torch.testing.assert_close(data[got][i][live], want, rtol=1e-5, atol=1e-5)
        a = advantages_of_group(data, i)
        weight = (a.sign() * (teacher - student.detach())).exp().clamp(0.8, 1.2)
        a_hat = a * (0.5 + 0.5 * weight)
        torch.testing.assert_close(data["advantages"][i][live], a_hat.expand(len(response)),
                                   rtol=1e-5, atol=1e-6)
        total = total - (a_hat * (student - student.detach()).exp()).sum()
    (total / tokens).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    errors = abs(metrics["actor/grad_norm"][0] - norm) / norm, abs(
        metrics["actor/loss"][0] - total.item() / tokens.item())
    print("parity: relative error of the gradient's norm {:.1e}, error of loss {:.1e}".format(
        *errors))
    assert max(errors) < TOLERANCE
    moved = {n: p.full_tensor() for n, p in trainer.worker.engine.module.named_parameters()}
    assert any(not torch.equal(moved[n], start[n]) for n in start)


def advantages_of_group(data, i):
    rewards = data["token_level_rewards"].sum(-1)[3:]  # before: a group of equal ones
    a = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return torch.cat([torch.zeros(3), a])[i]


def test_fused_and_verls_own_head_train_alike(cluster, monkeypatch):
    weights = []
    for fused in (False, True):
        trainer = make_trainer(cluster, monkeypatch, fused=fused)
        _, metrics = step(trainer, rollout())
        module = trainer.worker.engine.module
        weights.append(torch.cat([p.full_tensor().flatten() for p in module.parameters()]))
    start = torch.cat([p.flatten() for p in sharp_model().parameters()])
    error = ((weights[1] - weights[0]).norm() / (weights[0] - start).norm()).item()
    print(f"parity: relative distance of the weights after the update {error:.1e}")
    assert error < TOLERANCE


def test_no_teacher_pass_at_lambda_zero(cluster, monkeypatch):
    trainer = make_trainer(cluster, monkeypatch, fused=True, rlsd_lambda_decay_steps=2)
    calls, score = [], trainer.actor_rollout_wg.compute_log_prob
    trainer.actor_rollout_wg.compute_log_prob = lambda data: calls.append(1) or score(data)
    lams = []
    for trainer.global_steps in (1, 2, 3):
        old, _ = ray_trainer.RayPPOTrainer._compute_old_log_prob(trainer, rollout())
        lams.append(old.meta_info["rlsd_lambda"])
        assert ("teacher_log_probs" in old.batch) == (lams[-1] > 0)
    assert lams == [0.25, 0.0, 0.0] and len(calls) == 4


class Queue:
    """The calls of transfer_queue that v1 makes, on rows in this process."""

    def __init__(self):
        self.rows = {}

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        for i, key in enumerate(keys):
            row = self.rows.setdefault(key, {})
            row.update({name: fields[name][i] for name in fields.keys()})
        return KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id=partition_id)

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        names = select_fields or self.rows[keys[0]].keys()
        return list_of_dict_to_tensordict([
            {n: self.rows[key][n] for n in names if n in self.rows[key]} for key in keys
        ])


def queued(trainer, monkeypatch, batch):
    """The rollout as v1's agent loops leave it in the queue, whose worker reads and writes it."""
    queue, rows, keys = Queue(), [], []
    for module in (transfer_queue, trainer_base.tq):
        monkeypatch.setattr(module, "kv_batch_get", queue.kv_batch_get)
        monkeypatch.setattr(module, "kv_batch_put", queue.kv_batch_put)
    data, other = batch.batch, batch.non_tensor_batch
    for i in range(B):
        live = data["attention_mask"][i].bool()
        response = live[P:]
        rows.append({
            "prompts": data["prompts"][i][live[:P]], "responses": data["responses"][i][response],
            "input_ids": data["input_ids"][i][live], "position_ids": torch.arange(int(live.sum())),
            "response_mask": torch.ones(int(response.sum()), dtype=torch.int64),
            "rm_scores": data["token_level_rewards"][i][response],
            "uid": other["uid"][i], "extra_info": other["extra_info"][i],
            "multi_modal_inputs": {},
        })
        rows[-1]["loss_mask"] = rows[-1]["response_mask"]
        keys.append(f"{other['uid'][i]}_{i}_0")
    meta = queue.kv_batch_put(keys, "train", list_of_dict_to_tensordict(rows))
    worker = trainer.worker

    def compute_log_prob(given):
        if not isinstance(given, KVBatchMeta):
            return worker.infer_batch(given)
        td = queue.kv_batch_get(given.keys, "train").exclude("uid", "extra_info")
        tu.assign_non_tensor(td, **given.extra_info)
        out = worker.infer_batch(td)
        return queue.kv_batch_put(given.keys, "train", out.select("log_probs", "entropy"))

    trainer.actor_rollout_wg.compute_log_prob = compute_log_prob
    with open_dict(trainer.config):
        trainer.config.algorithm.use_kl_in_reward = False
        trainer.config.actor_rollout_ref.rollout.calculate_log_probs = False
        actor = trainer.config.actor_rollout_ref.actor
        actor.loss_agg_mode, actor.loss_scale_factor = "token-mean", None
    return queue, meta


def test_the_v1_trainer_comes_to_the_same_advantages(cluster, monkeypatch):
    trainer = make_trainer(cluster, monkeypatch, fused=True)
    want, _ = step(make_trainer(cluster, monkeypatch, fused=True), rollout())
    queue, meta = queued(trainer, monkeypatch, rollout())
    v1 = trainer_base.PPOTrainer
    meta = v1._compute_old_log_prob(trainer, meta, {})
    meta = v1._compute_advantage(trainer, meta, {})
    assert utils.compute_advantage is not ray_trainer.compute_advantage
    for i, key in enumerate(meta.keys):
        live = want.batch["response_mask"][i].bool()
        torch.testing.assert_close(
            queue.rows[key]["advantages"], want.batch["advantages"][i][live], rtol=1e-5, atol=1e-6
        )
    assert verl_teacher._given.get() is None  # of this step alone
    changed = copy.deepcopy(queue.rows)
    trainer.config.algorithm.rlsd_lambda = 0.0
    v1._compute_advantage(trainer, meta, {})
    assert any((queue.rows[k]["advantages"] != changed[k]["advantages"]).any() for k in meta.keys)
    with pytest.raises(UserError, match="takes one output of a session") as error:
        v1._compute_advantage(trainer, KVBatchMeta(
            keys=["a_0_0", "a_0_1"], tags=[{}, {}], partition_id="train"), {})
    one_sentence(error)


@pytest.mark.parametrize("extra, complaint", [
    ({}, "row 2 must be a chat, but is None"), ({"teacher_prompt": "x"}, "row 2 .* but is 'x'"),
], ids=["missing", "text"])
def test_a_row_without_a_teacher_prompt_is_refused(extra, complaint):
    batch = rollout()
    batch.non_tensor_batch["extra_info"][2] = extra
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = CHAT
    with pytest.raises(UserError, match=complaint) as error:
        verl_teacher.teacher_batch(batch, tokenizer, {})
    one_sentence(error)
    del batch.non_tensor_batch["extra_info"]
    with pytest.raises(UserError, match="row 0 must be a chat"):
        verl_teacher.teacher_batch(batch, tokenizer, {})
    batch = rollout()
    batch.non_tensor_batch["multi_modal_inputs"] = np.array([{"pixels": 1}] * B, dtype=object)
    with pytest.raises(UserError, match="takes no images") as error:
        verl_teacher.teacher_batch(batch, tokenizer, {})
    one_sentence(error)


@pytest.mark.parametrize("changed, complaint", [
    ({"rlsd_lambda": 1.5}, "rlsd_lambda must be"),
    ({"rlsd_reweight_clip_range": 2.0}, "rlsd_reweight_clip_range must be"),
    ({"rlsd_lamda": 0.5}, r"algorithm has none of \['rlsd_lamda'\]"),
    ({"rollout_correction": {"bypass_mode": True}}, "because bypass_mode leaves out"),
], ids=["lambda", "clip", "typo", "bypass"])
def test_bad_options_are_refused_before_anything_runs(changed, complaint):
    config = OmegaConf.create({"trainer": {}, "algorithm": algorithm(**changed)})
    with pytest.raises(ValueError, match=complaint) as error:
        verl_config.validate_config(config, use_reference_policy=False, use_critic=False)
    one_sentence(error)


def test_the_documented_command_line_composes_and_validates():
    command = ["algorithm.adv_estimator=rlsd", "+algorithm.rlsd_lambda=0.5",
               "actor_rollout_ref.model.use_fused_kernels=True", "trainer.n_gpus_per_node=1",
               "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch",
               "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
               "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        for more, v1 in (((), True), (("trainer.use_v1=False",), False)):
            config = compose("ppo_trainer", overrides=[*command, *more])
            verl_config.validate_config(config, use_reference_policy=False, use_critic=False)
            assert hook.options_of(config.algorithm) == hook.OPTIONS
            assert config.trainer.use_v1 == v1


def test_loaded_by_verl_it_says_what_it_replaced_and_refuses_other_versions():
    def python(code, **environment):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    done = python("from verl.trainer.main_ppo import validate_config\n"
                  "import rlsd.integrations.verl as hook\n"
                  "from verl.trainer.ppo.v1 import trainer_base, utils\n"
                  "assert utils.compute_advantage.func is hook.verl_teacher._advantage\n"
                  "assert trainer_base.PPOTrainer._compute_advantage.__wrapped__\n"
                  "assert validate_config is hook.verl_config.validate_config",
                  VERL_USE_EXTERNAL_MODULES="rlsd.integrations.verl")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RLSD: replaced verl's fused heads of text models") == 1
    done = python("import verl; verl.__version__ = '0.10.0'\nimport rlsd.integrations.verl")
    assert "UserError: The RLSD hook needs verl 0.9.x, but 0.10.0 is installed." in done.stderr
