"""The privileged teacher of RLSDTrainer: what it reads, when it scores, where it is saved.

It reads the messages that the student read, what an environment added to them included, with one
hint inserted: of the data, or of hint_func, which sees the rollout first. TRL tokenises both alike.
After it come the very tokens of the rollout, those of tools too, which no loss or weight is on.
"""

import asyncio
import atexit
import copy
import os

import torch
from datasets import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import (
    is_async_callable,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

from ..config import UserError
from ..policy.advantages import rlsd_lambda_at
from ..policy.checkpoint import reason
from ..policy.hints import can_hint, weighed
from ..policy.packing import left_pad
from ..policy.teacher import Teacher
from ..tasks.prompts import HINT_ARGUMENTS, require_same_start, teacher_prompt
from .trl_siblings import contrasted, require_siblings, sibling_contexts

HINT_COLUMNS = ("teacher_prompt", "privileged_context", "solution")
NOT_COLUMNS = (*HINT_ARGUMENTS, "completion_ids")
EMPTY_PROMPT = [{"role": "user", "content": ""}]  # TRL's, where the environment brings the prompt
CONTEXT = ("teacher_prompt_ids", "teacher_prompt_mask", "completion_ids", "completion_mask")
TEACHER_FILE = "rlsd_teacher.pt"


class _FollowStudent(TrainerCallback):
    """Lets the teacher follow after the optimizer step that ends a rollout."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        done = self.trainer.rollouts_done(state.global_step)
        if done > self.trainer.rollouts_done(state.global_step - 1):
            self.trainer.teacher.after_step(done)


class TaughtTrainer(GRPOTrainer):
    """GRPOTrainer beside a privileged teacher of the policy; RLSDTrainer adds passes and loss."""

    teacher = hint_func = None

    def _add_teacher(self):
        args = self.args
        self._require_teachable(args)
        # Only what is trained is copied, an adapter say; the model borrows it for its pass.
        trained = torch.nn.ParameterList(p for p in self.model.parameters() if p.requires_grad)
        rates = {"sync_steps": args.teacher_sync_steps, "ema_rate": args.teacher_ema_rate}
        self.teacher = Teacher(trained, args.teacher_model_kind, **rates)
        self.add_callback(_FollowStudent(self))
        asks = self.hint_func is not None and is_async_callable(self.hint_func)
        if asks and not self._has_async_funcs:
            # On a thread, as TRL runs coroutines: the loop of a notebook is busy.
            thread, self.async_loop, _ = start_event_loop_in_daemon(name="hint_func")
            atexit.register(shutdown_event_loop_in_daemon, thread, self.async_loop)

    def _require_teachable(self, args):
        """Refuse, before the first step, what would leave the teacher blind or wrong."""
        data, ask = self.train_dataset, self.hint_func
        columns = set(data.column_names or ())
        methods = [tool.__name__ for tool in self.tools if tool not in self._standalone_tools]
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        # Elsewhere contexts are known only after a rollout.
        of_data = ask is None and self.rollout_func is None and args.hint_source == "data"
        for applies, what in (
            (not (ask is None or callable(ask)), f"hint_func must be a function, but is {ask!r}"),
            (ask is not None and "feedback" in columns, "hint_func gets feedback from the rollout, "
             "but train_dataset has a column of that name; rename it"),
            (self.rollout_func is not None and "teacher_prompt_ids" in columns, "rollout_func may "
             "return teacher_prompt_ids, but train_dataset has a column of that name; rename it"),
            (ask is not None and "feedback" in methods, "feedback is a method of the environment, "
             "which TRL offers to the model as a tool; make it an attribute"),
            (self._is_vlm, "The teacher takes no images, but processing_class is a processor"),
            (sharded and args.teacher_model_kind != "live", "FSDP and DeepSpeed shard the weights "
             f"of which teacher_model_kind={args.teacher_model_kind!r} keeps a copy; use 'live'"),
            (of_data and data.column_names is not None and not columns & set(HINT_COLUMNS),
             f"train_dataset has none of the columns {', '.join(HINT_COLUMNS)}, so the teacher "
             "would know no more than the student; add one, give a hint_func"),
        ):
            if applies:
                raise UserError(f"{what}, or set rlsd_lambda to 0.")
        if args.reads_siblings():
            require_siblings(self)
        if self.rollout_func is None and not isinstance(data, IterableDataset):
            read = ("prompt", "environment", *(HINT_COLUMNS if of_data else ()))
            later = {} if of_data else {"privileged_context": "0"}  # some harmless hint
            for i, row in enumerate(data.select_columns([c for c in read if c in columns])):
                row = {"prompt": EMPTY_PROMPT, **later, **row}
                self._teacher_prompt(row, f"Row {i} of train_dataset", check_start=i == 0)

    def rollouts_done(self, global_step):
        """Rollouts completed after so many optimizer steps; a resumed run counts on from them."""
        accumulation = self.args.gradient_accumulation_steps
        every = self.args.steps_per_generation * self.num_iterations  # micro-batches per rollout
        return global_step * accumulation // max(every, accumulation)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [c for c in HINT_COLUMNS if c not in self._signature_columns]

    def _teacher_prompt(self, row, name, *, check_start=True):
        """What the teacher reads for a row, or None where a hint may be missing."""
        if "privileged_context" not in row:
            row = {**row, "privileged_context": row.get("solution")}
        return teacher_prompt(
            row, name, self._tokenizer, self.args.privileged_template, check_start=check_start,
            placement=self.args.hint_placement,
            allow_missing=self.args.allow_missing_privileged_context,
            template_options=self._template_options(row),
        )

    def _template_options(self, row):
        """What TRL gives the chat template of a row; an environment brings tools of its own."""
        tools = self.tools
        if self.environment_factories is not None:
            name = row.get("environment") if self._multi_environment else None
            if name not in self._env_tools:
                raise UserError(f"A row of train_dataset has the environment {name!r}, but "
                                f"environment_factory has {', '.join(self._env_tools)}.")
            tools = self._env_tools[name]
        return {"tools": tools or None, "chat_template": self.chat_template,
                **self.chat_template_kwargs}

    def _hinted_prompts(self, inputs):
        """What the teacher reads for each sequence of the rollout, None where it has no hint."""
        prompts, completions = self._rollout
        if self.hint_func is not None:
            hints = self._ask(inputs, prompts, completions)
            return [self._with_hint(*x) for x in zip(inputs, prompts, hints, strict=True)]
        hinted = []
        for row, prompt in zip(inputs, prompts, strict=True):
            name = f"The row of train_dataset with the prompt {prompt!r:.80}"
            if row.get("teacher_prompt") and row.get("prompt", EMPTY_PROMPT) != prompt:
                raise UserError(
                    f"{name} has a teacher_prompt, which lacks what its environment added to the "
                    "prompt; give the hint as privileged_context, or by hint_func."
                )
            if self.rollout_func is not None and not any(row.get(x) for x in HINT_COLUMNS) and (
                not self.args.allow_missing_privileged_context
            ):
                raise UserError(
                    f"{name} has no hint, and rollout_func returned no teacher_prompt_ids; return "
                    "them, a list of token ids for each sequence, or give a hint_func."
                )
            hinted.append(self._teacher_prompt({**row, "prompt": prompt}, name))
        return hinted

    def _ask(self, inputs, prompts, completions):
        """hint_func's text for each sequence of the rollout, or None."""
        calls = []
        for i, row in enumerate(inputs):
            feedback = row.get("feedback")  # of rollout_func
            if self.environments is not None:
                feedback = getattr(self.environments[i], "feedback", feedback)
            columns = {name: x for name, x in row.items() if name not in NOT_COLUMNS}
            calls.append(((copy.deepcopy(prompts[i]), completions[i], feedback), columns))
        if is_async_callable(self.hint_func):
            async def one(given, columns):
                return await self.hint_func(*given, **columns)

            async def all_of_them():
                return await asyncio.gather(*(one(*x) for x in calls), return_exceptions=True)

            hints = asyncio.run_coroutine_threadsafe(all_of_them(), self.async_loop).result()
        else:
            hints = []
            for given, columns in calls:
                try:
                    hints.append(self.hint_func(*given, **columns))
                except Exception as error:
                    hints.append(error)
        for prompt, hint in zip(prompts, hints, strict=True):
            after = f"for a completion of the prompt {prompt!r:.80}"
            if isinstance(hint, BaseException):
                raise UserError(
                    f"hint_func failed {after} ({type(hint).__name__}: {reason(hint)})."
                ) from hint
            if not isinstance(hint, str | None):
                raise UserError(
                    f"hint_func must return a text or None, but returned {hint!r:.80} {after}."
                )
        return hints

    def _with_hint(self, row, prompt, hint):
        """The prompt with a text of hint_func, None where that cannot be a hint."""
        if hint is None or not can_hint(hint, self._tokenizer):
            return None
        read, placement = {"prompt": prompt, "privileged_context": hint}, self.args.hint_placement
        hinted = teacher_prompt(
            read, f"The prompt {prompt!r:.80}", self._tokenizer, self.args.privileged_template,
            placement=placement, check_start=False,
        )
        options = self._template_options(row)
        try:
            require_same_start(read, hinted, self._tokenizer, options, placement)
        except UserError:
            return None
        return hinted

    def _contexts(self, inputs, student):
        """Token ids that the teacher reads before each sequence, None where it has no hint.

        student: those that the policy read.
        """
        if self.rollout_func is not None and "teacher_prompt_ids" in inputs[0]:
            return [row["teacher_prompt_ids"] for row in inputs]
        prompts, hinted = self._rollout[0], self._hinted_prompts(inputs)
        if self.rollout_func is not None:
            for prompt, read, want, own in zip(
                prompts, hinted, self._tokenize_prompts(prompts)[0], student, strict=True
            ):
                if read is not None and own != want:
                    raise UserError(
                        f"The prompt_ids that rollout_func returned for {prompt!r:.80} are not "
                        "those of the row, so the teacher's cannot be made from it; return "
                        "teacher_prompt_ids too, a list of token ids for each sequence, or set "
                        "rlsd_lambda to 0."
                    )
        ids = self._tokenize_prompts(
            [read or prompt for read, prompt in zip(hinted, prompts, strict=True)]
        )[0]
        return [None if read is None else x for read, x in zip(hinted, ids, strict=True)]

    def _require_contexts(self, inputs):
        """UserError where rollout_func returned teacher_prompt_ids that are none."""
        if self.rollout_func is None or not any("teacher_prompt_ids" in row for row in inputs):
            return
        if self.hint_func is not None:
            raise UserError("rollout_func returned teacher_prompt_ids, so nothing would read the "
                            "texts of hint_func; leave one of them out.")
        rows = self.model.config.get_text_config().vocab_size
        for i, row in enumerate(inputs):
            ids = row.get("teacher_prompt_ids", ())
            if ids is not None and not (isinstance(ids, list) and ids and all(
                isinstance(x, int) and 0 <= x < rows for x in ids
            )):
                raise UserError(
                    "The teacher_prompt_ids of rollout_func must be a list of token ids below "
                    f"{rows} for each of the {len(inputs)} sequences, or None for plain A, but "
                    f"number {i} is {ids!r:.80}."
                )

    def _calculate_rewards(self, *args):
        if self.teacher is not None and self.model.training:
            self._require_contexts(args[0])  # before TRL trips over too few
            self._rollout = copy.deepcopy(args[1:3])  # prompts and completions, as rewards get them
        rewards = super()._calculate_rewards(*args)
        if self.model.training:
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
            groups = total.view(-1, self.num_generations)
            constant = (groups == groups[:, :1]).all(1).repeat_interleave(self.num_generations)
            self._constant, self._rewards = (
                x.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
                for x in (constant, total)
            )
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.teacher is None or not self.model.training:
            return output
        if self.multi_objective_aggregation == "sum_then_normalize":
            # TRL's fp32 mean of equal rewards is not always theirs: eight of 0.9 give A = -6e-4.
            output["advantages"] = output["advantages"].masked_fill(self._constant, 0)
        args, step = self.args, self.rollouts_done(self.state.global_step) + 1
        lam = rlsd_lambda_at(
            step, args.rlsd_lambda, args.rlsd_lambda_warmup_steps, args.rlsd_lambda_decay_steps
        )
        output["rlsd_lambda"] = torch.tensor(lam, dtype=torch.float64)
        if lam > 0:
            device = output["completion_ids"].device
            student = [ids[mask.bool()].tolist() for ids, mask in zip(
                output["prompt_ids"], output["prompt_mask"], strict=True
            )]
            contexts, wanted = [None] * len(student), torch.ones(len(student), dtype=torch.bool)
            if args.hint_source == "data":
                contexts = self._contexts(inputs, student)
            if args.reads_siblings():
                options = [self._template_options(row) for row in inputs]
                hints = sibling_contexts(self, self._rollout[0], output, contexts, options, step)
                contexts = [own[0] if own else None for own in hints]
                wanted = weighed(output["advantages"], args)
            output["has_hint"] = torch.tensor([x is not None for x in contexts])
            output["teacher_prompt_ids"], output["teacher_prompt_mask"] = left_pad(
                [x or own for x, own in zip(contexts, student, strict=True)],
                self._tokenizer.pad_token_id, device,
            )
            missing = ~output["has_hint"].to(device) & wanted.to(device)
            counts = torch.stack([missing.sum(), wanted.to(device).sum()]).float()
            missing, of = self.accelerator.gather(counts).view(-1, 2).sum(0).tolist()
            name = "contrast" if args.reads_siblings() else "hint"
            if of:
                self._metrics["train"][f"rlsd/{name}_missing_frac"].append(missing / of)
            if args.rlsd_contrast_hints:
                output["advantages"], weights, metrics = contrasted(
                    self, output, student, hints, lam
                )
                output["rlsd_lambda"].zero_()  # all is in A_hat
                if weights is not None:
                    output["rlcsd_weights"] = weights
                del metrics["rlsd/contrast_missing_frac"]
                for name, x in sorted(metrics.items()):
                    x = self.accelerator.gather(torch.tensor(x, device=device)).nanmean().item()
                    if x == x:
                        self._metrics["train"][name].append(x)
        return output

    @torch.no_grad()
    def _teacher_log_probs(self, inputs):
        """(B, T) log-probs after the privileged prompts, 0 where no token is re-weighted."""
        if "teacher_log_probs" in inputs:
            return inputs["teacher_log_probs"]
        ids, advantages = inputs["completion_ids"], inputs["advantages"]
        need = advantages < 0 if self.args.rlsd_negative_only else advantages != 0
        need = need.view(len(ids), -1).any(1)
        need = need & inputs["has_hint"].to(need.device) & inputs["completion_mask"].any(1)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            need = torch.ones_like(need)  # every rank must run forward, which gathers weights
        log_probs = torch.zeros(ids.shape, device=ids.device)
        if need.any():
            context = [inputs[name][need] for name in CONTEXT]
            with self.teacher.lent_to(self.model):
                log_probs[need] = self._score(*context)
        if self.teacher.kind != "live":  # which moves on between the iterations over a rollout
            inputs["teacher_log_probs"] = log_probs
        return log_probs

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.teacher is not None and self.teacher.kind != "live" and self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial),
                                  f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            state = {"kind": self.teacher.kind, **self.teacher.state_dict()}
            torch.save(state, os.path.join(folder, TEACHER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.teacher is None or self.teacher.kind == "live":
            return
        path, state = os.path.join(checkpoint, TEACHER_FILE), {"kind": "no"}
        if os.path.exists(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if state["kind"] != self.teacher.kind:
            raise UserError(f"{checkpoint} holds {state['kind']} teacher, but this run's "
                            f"teacher_model_kind is {self.teacher.kind!r}.")
        self.teacher.load_state_dict(state)
