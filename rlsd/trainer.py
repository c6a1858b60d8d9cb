"""The whole RLSD loop: sample groups, verify, score in the privileged context, one fused update.

One rollout step: questions -> G completions each -> rewards -> group advantages -> sequences
without a gradient dropped -> teacher forward where one is read, student forward -> the objective's
loss -> optimizer -> teacher sync. Masters are fp32; neither micro-batches nor packing change loss
or gradient. Of sft the reference solutions take the place of the completions.
"""

import dataclasses
import math
import time
from pathlib import Path

import torch
import transformers
from torch.nn.utils import clip_grad_norm_, get_total_norm

from rlsd_kernels import available_impls, merge_stats

from .config import TrainConfig, UserError
from .policy import checkpoint
from .policy.advantages import group_advantages, lambda_of
from .policy.distributed import Processes, whole
from .policy.models import (
    Flops,
    MasterWeights,
    checkpoint_layers,
    keep_base,
    load_student,
    open_policy,
    peak_flops,
    sharing,
)
from .policy.teacher import Teacher, teacher_of
from .policy.update import (
    Passed,
    Stopped,
    log_probs_under,
    memory_named,
    require_contract,
    router_totals,
    sampling_metrics,
    student_terms,
    teacher_inputs,
    token_weights,
    training_batch,
)
from .reports.report import (
    Clock,
    Reporter,
    hub_repository,
    plot_runs,
    print_samples,
    push,
    read_metrics,
    require_packages,
    samples_of,
    write_card,
    write_completions,
)
from .sampling.agents import agent_of
from .sampling.evaluation import evaluate
from .sampling.leak import leak_metrics
from .sampling.rollout import loss_mask, references, roll_out, rollout_metrics
from .sampling.samplers import choose_sampler, require_room
from .tasks import rewards
from .tasks.data import load_data, rows_of_step
from .tasks.tools import load_tools


class Trainer:
    """Trains a causal LM by RLSD, GRPO or another objective of rlsd.objectives.OBJECTIVES.

    config: TrainConfig. reward_funcs: callables that replace config.reward_funcs. resume_from: a
    checkpoint folder. Raises UserError, in one sentence, on anything a user can fix.
    """

    def __init__(self, config: TrainConfig, *, reward_funcs=None, resume_from=None, log=print):
        self.config, self.processes = config, Processes(config)
        told = log if self.processes.main else lambda *_: None
        for name in ("model_name_or_path", "train_dataset"):
            if not getattr(config, name):
                raise UserError(f"{name} is not set; give it in the config or as --{name}.")
        self.run_dir = Path(config.output_dir)
        self.inside = []  # in the main process: what keeps other runs out, to the end of train()
        self.processes.once(lambda: self.inside.append(checkpoint.enter(self.run_dir, resume_from)))
        self.loss_config = config.loss_config()
        on_gpu = torch.cuda.is_available() and not config.device.startswith("cpu")
        why_not = available_impls(None if on_gpu else torch.empty(0)).get(config.impl, "ok")
        if why_not != "ok":
            raise UserError(f"impl={config.impl!r} cannot run: {why_not}")
        self.reward_funcs = rewards.load_reward_funcs(reward_funcs or config.reward_funcs, config)
        require_packages(config)
        weights = str(resume_from or config.model_name_or_path)
        self.tokenizer = checkpoint.load_tokenizer(weights)
        self.processor = checkpoint.load_processor(weights)
        tools = load_tools(config)
        self.agent = agent_of(config, self.tokenizer, tools, self)
        self.reward_funcs += self.agent.reward_funcs if self.agent else []
        self.rows, self.held_out = load_data(config, self.tokenizer, told, self.processor, tools)
        rows = [*self.rows, *self.held_out]
        self.processes.once(lambda: rewards.require_scorable(self.reward_funcs, rows))
        self.questions = config.generation_batch_size // config.num_generations
        self.max_steps = config.steps_over(len(self.rows))
        self.processes.require_room_for(self.questions, rows)
        self.model = load_student(config, weights, resuming=resume_from is not None)
        self.weights = MasterWeights(self.model, config.bf16)
        self.policy = open_policy(
            self.model, self.tokenizer.pad_token_id, config, uniform=self.processes.sharded,
            log=told,
        )
        require_room(self.model, rows, config)
        self.sample = choose_sampler(self.model, self.tokenizer, config, self.processes, log)
        self.flops, shard = Flops(self.model), self.processes.shard
        if self.processes.sharded:  # layer by layer its shards go back to the device
            self.weights.undo()
            self.model.to("cpu")
        self.teacher = teacher_of(config, self.policy, self.tokenizer, shard)
        if config.teacher_model_name_or_path:
            require_room(self.teacher.model, self.rows, config)
            if self.policy.layout.share_prompts:
                self.policy = self.policy._replace(layout=sharing(
                    self.teacher.model, self.policy.layout, config.share_prompts, told
                ))
        self.reference = Teacher(self.model, "base", shard=shard) if config.beta > 0 else None
        if config.gradient_checkpointing:  # after the copies: they never see a backward pass
            checkpoint_layers(self.model)
        if self.processes.sharded:
            shard(self.model)
            self.weights = MasterWeights(self.model, config.bf16, sharded=True)
        self.optimizer = torch.optim.AdamW(
            self.weights.masters, lr=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
        )
        self.scheduler = transformers.get_scheduler(
            config.lr_scheduler_type, self.optimizer, num_warmup_steps=config.warmup_steps,
            num_training_steps=self.max_steps * config.num_iterations,
        )
        self.parts = checkpoint.Parts(
            self.optimizer, self.scheduler, self.weights, self.teacher, self.reference
        )
        self.clock, self.peak_flops = Clock(self.model.device), peak_flops(self.model.device)
        self.step = self.saved = self.parts.load(resume_from) if resume_from else 0
        self.between = True  # steps: all weights are those of self.step

    def train(self):
        """Run to the last step; returns the records of metrics.jsonl in the main process."""
        config = self.config
        if self.step >= self.max_steps:
            at = f"{self.run_dir} is already at step {self.step}"
            raise UserError(f"{at}; raise max_steps to go on.")
        repository = self.processes.once(lambda: hub_repository(config))
        with Reporter(
            self.run_dir, dataclasses.asdict(config), config.report_to, self.max_steps, self.step,
            silent=not self.processes.main,
        ) as report, self.processes.united(lambda: checkpoint.standing(self.run_dir)), \
                rewards.rescued_by(lambda error: self._saved(self.processes.told(error))):
            self.processes.once(report.start_trackers)
            if self.step == 0:
                self.processes.once(lambda: keep_base(config))
            if self.step == 0 and config.eval_steps:
                report.progress(0, report.log(0, self.evaluate()))
            while self.step < self.max_steps:
                try:
                    (metrics, samples), evaluated = self.train_step(self.step + 1), {}
                    self.step, self.between = self.step + 1, True
                    try:
                        evaluated = self.evaluate() if self._due(config.eval_steps) else {}
                    finally:
                        record = report.log(self.step, metrics | evaluated)
                except UserError as error:
                    raise self._saved(error) from error.__cause__
                if evaluated or self._due(config.logging_steps):
                    report.progress(self.step, record)
                if samples and self.processes.main:
                    write_completions(self.run_dir, self.step, samples)
                    print_samples(samples, self.step)
                if self._due(config.save_steps) or self.step == self.max_steps:
                    self.save()
        self.inside.clear()
        if not self.processes.main:
            return []
        if config.plot_curves:
            plot_runs({config.objective: [self.run_dir]}, self.run_dir / "curves.png")
        if repository:
            push(repository, checkpoint.latest(self.run_dir))
        return read_metrics(self.run_dir)

    def _saved(self, error):
        """The error, and where the steps are safe: saved now, unless NaN would replace them."""
        if not self.step:
            return error
        together = self.between and (
            self.processes.size == 1 or isinstance(error, rewards.RewardError | Stopped)
        )
        safe = checkpoint.standing(self.run_dir)
        if together and math.isfinite(whole(get_total_norm(self.weights.masters)).item()):
            if self.saved < self.step:
                self.save()
            safe = f"all {self.step} steps before are safe in {self.run_dir}/checkpoint-{self.step}"
        return UserError(f"{str(error).rstrip('.')}; {safe}.")

    def _due(self, every):
        return every > 0 and (self.step % every == 0 or self.step == self.max_steps)

    def evaluate(self):
        """Held-out metrics; {} without held-out questions."""
        if not self.held_out:
            return {}
        began = time.monotonic()
        with memory_named("evaluating", "rollout_batch_size"):
            metrics = evaluate(
                self.model, self.tokenizer, self.held_out, self.config, self.reward_funcs,
                self.config.seed, self.processes, self.sample, self.agent,
            )
        return metrics | {"time/eval": time.monotonic() - began}

    def train_step(self, step):
        """One rollout and its optimizer steps; returns (metrics, samples or None)."""
        config, self.clock = self.config, Clock(self.model.device)
        # Every generator, at every step: what ran in between, a table printed by rich (it draws
        # from Python's) or a resume, then cannot change a reward function that draws.
        transformers.set_seed((config.seed * 1_000_003 + step) % 2**32)
        supervised = config.method.supervised
        size = 1 if supervised else config.num_generations
        rows = rows_of_step(self.rows, self.questions, step, config.seed)
        rows = [row for row in rows for _ in range(size)]
        with self.clock("rollout"), memory_named(
            "sampling", "rollout_batch_size or max_completion_length"
        ):
            if supervised:
                rollout = references(
                    rows, self.tokenizer, config, self.reward_funcs, self.model.device,
                    self.processes,
                )
                advantages = torch.ones(len(rows))
            else:
                rollout = roll_out(
                    self.model, self.tokenizer, rows, config, self.reward_funcs, self.processes,
                    sample=self.sample, agent=self.agent, hindsight=True,
                )
                advantages = group_advantages(rollout.rewards, size, config.scale_rewards)
        advantages, rolled = advantages.to(rollout.mask.device), time.monotonic()

        with memory_named(
            "training", "per_device_train_batch_size or max_tokens_per_micro_batch, or set "
            "gradient_checkpointing, bf16 or use_peft",
        ):
            batch, live, noted = self.make_batch(rollout, advantages, step)
            metrics, outputs = self.update(batch, step)
        if self.teacher:
            self.teacher.after_step(step)

        spared = batch.spared(config, self.policy.layout)
        metrics |= noted | rollout_metrics(rollout, advantages, size, config) | {
            "live_sequences": len(live), "time/update": time.monotonic() - rolled,
            "prompt_sharing/tokens_saved": sum(map(sum, spared)),
        }
        metrics |= self.clock.metrics(
            rollout.mask.sum().item() + sum(len(row["prompt_ids"]) for row in rollout.rows)
            - sum(spared[0]),
            self.flops.update(batch, config, spared) / self.processes.size, self.peak_flops,
        )
        if not supervised:
            metrics |= rewards.reward_metrics(self.reward_funcs, rollout.rewards_per_func)
            metrics |= leak_metrics(rollout, config, "leak_rate")
        samples = None
        if config.log_completions_steps and step % config.log_completions_steps == 0:
            weights = torch.ones_like(rollout.mask, dtype=torch.float32)
            if live and (lam := lambda_of(config, step)) > 0:
                weights[live] = token_weights(batch, *outputs, lam, self.loss_config)
            samples = samples_of(self.tokenizer, rollout, advantages, weights)
        return metrics, samples

    def make_batch(self, rollout, advantages, step):
        """The live sequences of a rollout as a Batch, their indices, metrics of their hints."""
        batch, live, noted = training_batch(
            rollout, loss_mask(rollout, self.config), advantages, step, self.tokenizer, self.config,
            lambda part: self._scored(self.teacher, part),
        )
        if self.reference is not None and live:
            batch = batch._replace(ref_log_probs=self._scored(self.reference, batch))
        return batch, live, noted

    def _scored(self, scorer, batch):
        """(B, T) log-probs after a Batch's prompts, under a Teacher's weights, in all processes."""
        config, parts = self.config, self._micro_batches(batch)
        with self.clock("teacher"), scorer.scoring() as model:
            policy = self.policy._replace(model=model)
            log_probs = log_probs_under(policy, batch, parts, config.temperature, config.impl)
            self.processes.sum_(log_probs)
        return log_probs

    def _micro_batches(self, batch):
        """This process's: lists of sequences, [] where it only keeps the others company."""
        return self.processes.deal(batch.micro_batches(self.config, self.policy.layout))

    def update(self, batch, step):
        """num_iterations optimizer steps on a batch; returns (metrics, outputs of the first).

        The first pass is on-policy (ratio 1), and its log-probs are the old ones of the rest. A
        batch without a live sequence carries no signal and makes no optimizer step.
        """
        config, lam = self.config, 0.0 if batch.a_hat is not None else lambda_of(self.config, step)
        # Until old log-probs exist, delta's student is this very forward under either source.
        loss_config = dataclasses.replace(self.loss_config, rlsd_delta_source="current")
        metrics = {
            "rlsd/effective_lambda": lam, "loss": 0.0, "aux_loss": 0.0, "grad_norm": 0.0,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        outputs, stats = None, []
        for iteration in range(config.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            passed = self.accumulate(batch, step, lam, loss_config)
            grad_norm = self.optimizer_step(step, passed.loss) if batch.prompts else 0.0
            self.scheduler.step()
            for name, value in (
                ("loss", passed.loss), ("aux_loss", passed.aux_loss), ("grad_norm", grad_norm)
            ):
                metrics[name] += value / config.num_iterations
            metrics |= passed.errors
            stats += passed.stats
            if iteration == 0:
                outputs = passed.log_probs, passed.teacher_log_probs
                self.processes.sum_(*outputs)
                loss_config = self.loss_config
                keep = lam > 0 and self.teacher.kind != "live"  # a live teacher moves on
                batch = batch._replace(
                    old_log_probs=outputs[0], teacher_log_probs=outputs[1] if keep else None
                )
        stats = self.processes.joined(stats)
        if stats:
            merged = {k: v.item() for k, v in merge_stats(stats).items()}
            metrics = {k: v for k, v in merged.items() if not k.startswith("tokens/")} | metrics
            metrics |= sampling_metrics(batch, outputs[0], config.sampling_clip_max())
        return metrics, outputs

    def accumulate(self, batch, step, lam, loss_config):
        """Passed: what this process's micro-batches gave, their gradients added to the weights."""
        config, parts = self.config, self._micro_batches(batch)
        log_probs, teacher_log_probs = (torch.zeros_like(batch.loss_weights) for _ in range(2))
        losses = torch.zeros(2, dtype=torch.float64, device=batch.mask.device)
        totals, stats, deviations = None, [], []
        if self.policy.router and (len(parts) > 1 or self.processes.size > 1):
            with self.clock("loss"):
                totals = router_totals(self.policy, batch, parts)
                self.processes.sum_(*totals)
        check = config.validate_every and step % config.validate_every == 0
        for k, rows in enumerate(parts):
            part, teacher = batch.select(rows), {}
            if lam > 0 or config.method.distils:
                with self.clock("teacher"), self.teacher.scoring() as model:
                    teacher = teacher_inputs(
                        self.policy._replace(model=model), part, loss_config,
                        full_vocabulary=config.method.distils, sharded=self.processes.sharded,
                    )
            with self.clock("loss"):
                out, aux, deviation = student_terms(
                    self.policy, part, teacher, lam, loss_config, config, totals=totals,
                    check=check and k == 0,
                )
                aux = aux * bool(rows)
                ((out.loss + aux) * self.processes.loss_scale()).backward()
                losses += torch.stack([out.loss.detach(), aux.detach()])
            deviations += [deviation] if deviation else []
            if rows:
                stats.append(out.stats)
                log_probs[rows, : out.log_probs.shape[1]] = out.log_probs
                if out.teacher_log_probs is not None:
                    teacher_log_probs[rows, : out.log_probs.shape[1]] = out.teacher_log_probs
        self.processes.sum_(losses)
        if check:
            self.processes.everywhere(lambda: [require_contract(*d, step) for d in deviations])
        errors = {f"validate/{name}": e for found, _ in deviations for name, e in found.items()}
        return Passed(*losses.tolist(), log_probs, teacher_log_probs, stats, errors)

    def optimizer_step(self, step, loss):
        """One step on the gradients of all processes; returns their norm."""
        with self.clock("optim"):
            self.processes.sum_gradients(self.weights.masters)
            norm = clip_grad_norm_(self.weights.masters, self.config.max_grad_norm)
            if not math.isfinite(loss + (grad_norm := whole(norm).item())):
                said = f"Step {step}: loss is {loss} and the gradient norm {grad_norm}"
                raise Stopped(f"{said}, so training stopped before this update; lower "
                              "learning_rate or look at the rewards.")
            self.between = False
            self.optimizer.step()
            self.weights.publish()
        return grad_norm

    def save(self):
        """Write checkpoint-<step> of the run, whole or not at all."""
        self.saved = self.step
        return checkpoint.save(
            self.run_dir, self.step, self.model, self.processor or self.tokenizer, self.parts,
            self.processes, sharded=self.config.sharded_checkpoints,
            limit=self.config.save_total_limit,
            card=self.processes.once(lambda: write_card(self.run_dir, self.config, self.step)),
        )
