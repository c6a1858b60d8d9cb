"""What the privileged context knows, measured before any training: can it tell right from wrong?

Answers are sampled from the bare question, as in training, and scored under the same weights with
and without the hint. The gap of a token is log P_T - log P_S. RLSD moves credit along it, so what
counts is whether it is lower on wrong answers than on right ones, and where: on the first token
that leaves the hint's own words, or everywhere, which is style. The teacher's own pass@1 says
whether the model can use the hint at all.
"""

import dataclasses
import importlib.metadata

import torch

from ..config import UserError
from ..policy.advantages import group_advantages
from ..policy.checkpoint import load_model, load_processor, load_tokenizer
from ..policy.distributed import Processes
from ..policy.hints import contrast_hints, teacher_prompts
from ..policy.models import open_policy
from ..policy.update import Batch, evidence_of, log_probs_under
from ..tasks.data import load_data, rows_of_step
from ..tasks.rewards import load_reward_funcs, require_scorable
from ..tasks.tools import load_tools
from .agents import agent_of
from .evaluation import interval, is_right
from .rollout import roll_out, written
from .samplers import choose_sampler, generate, require_room

SHORTER = 0.15  # share of the answer's tokens


def auc(right, wrong):
    """Chance that a value of `right` is above one of `wrong`, ties half; None without a pair."""
    if not len(right) or not len(wrong):
        return None
    difference = torch.as_tensor(right)[:, None] - torch.as_tensor(wrong)[None]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def first_leaving(ids, reference):
    """Index of the first id that is not the reference's; None where ids are a start of it."""
    for k, token in enumerate(ids):
        if k >= len(reference) or token != reference[k]:
            return k
    return None


def batch_of(rollout, privileged, hints=None):
    """A Batch of all of a rollout, for passes without a loss."""
    zeros = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
    return Batch(
        prompts=[row["prompt_ids"] for row in rollout.rows], teacher_prompts=privileged,
        images=[row.get("_images") for row in rollout.rows],
        completion_ids=rollout.completion_ids, mask=written(rollout),
        completion_mask=rollout.mask, advantages=zeros[:, 0], loss_weights=zeros, hints=hints,
    )


def score(policy, batch, config):
    """(B, T) log-probs of a Batch's completions after its prompts."""
    parts = batch.micro_batches(config, policy.layout)
    return log_probs_under(policy, batch, parts, config.temperature, config.impl)


def gaps(policy, rollout, config, privileged=None):
    """(B, T) log P_T - log P_S of every sampled token, the same weights in both contexts.

    privileged: what the teacher reads before each, token ids; default: the rows' hints.
    """
    batch = batch_of(
        rollout, privileged or [row["teacher_prompt_ids"] for row in rollout.rows]
    )
    student = score(policy, batch, config)
    teacher = score(policy, batch._replace(prompts=batch.teacher_prompts), config)
    return torch.where(written(rollout), teacher - student, 0.0).double()


def sibling_gaps(policy, tokenizer, rollout, config):
    """((B, T) what a run that reads siblings weighs tokens by, (B,) bool which answers have it).

    That is e_t of a contrast, or the gap with a right sibling as the hint.
    """
    advantages = group_advantages(rollout.rewards, config.num_generations, config.scale_rewards)
    read = rollout, advantages, config.rlsd_lambda, 1, tokenizer, config
    hints, own = contrast_hints(*read), [row["prompt_ids"] for row in rollout.rows]
    if hints is None:
        privileged = teacher_prompts(*read)
        gap = gaps(policy, rollout, config, [p or q for p, q in zip(privileged, own, strict=True)])
        return gap, [p is not None for p in privileged]

    evidence = evidence_of(
        batch_of(rollout, own, hints), lambda batch: score(policy, batch, config),
        config.rlsd_contrast_hints,
    )
    return torch.where(written(rollout), evidence, 0.0).double(), [bool(ids) for ids in hints]


def gap_metrics(gap, rollout, references, size, given=None):
    """How the gap lies on right and wrong answers, `size` to a question.

    references: per row the token ids of the hint as an answer, EOS included. given: which answers
    have a gap; default: all.
    """
    right, own = is_right(rollout.rewards_per_func, size).tolist(), written(rollout)
    found = {True: [], False: []}  # mean gap of every answer
    at = {(kind, place): [] for kind in (True, False) for place in ("before", "first", "after")}
    by_question = []
    for i, (kind, reference) in enumerate(zip(right, references, strict=True)):
        keep = own[i]
        values, ids = gap[i][keep].tolist(), rollout.completion_ids[i][keep].tolist()
        if i % size == 0:
            by_question.append({True: [], False: []})
        if not values or given is not None and not given[i]:
            continue
        mean = sum(values) / len(values)
        found[kind].append(mean)
        by_question[-1][kind].append(mean)
        k = first_leaving(ids, reference)
        if k is not None:
            at[kind, "before"] += values[:k]
            at[kind, "first"].append(values[k])
            at[kind, "after"] += values[k + 1 :]
    within = [
        (auc(q[True], q[False]), len(q[True]) * len(q[False])) for q in by_question
        if q[True] and q[False]
    ]
    pairs = sum(n for _, n in within)
    metrics = {
        "auc": auc(found[True], found[False]),
        "auc_within_question": sum(a * n for a, n in within) / pairs if pairs else None,
        "questions_with_both": len(within),
    }
    for kind, name in ((True, "right"), (False, "wrong")):
        first = at[kind, "first"]
        metrics |= {
            f"{name}_samples": len(found[kind]), f"{name}_gap": _mean(found[kind]),
            f"{name}_leaving": len(first), f"{name}_gap_before_leaving": _mean(at[kind, "before"]),
            f"{name}_gap_first_leaving": _mean(first),
            f"{name}_gap_after_leaving": _mean(at[kind, "after"]),
            f"{name}_first_leaving_negative": _mean([float(v < 0) for v in first]),
        }
    return metrics


def _mean(values):
    return sum(values) / len(values) if values else None


def check_hints(
    policy, tokenizer, rows, config, reward_funcs, processes, sample=generate, agent=None
):
    """Metrics of the hints of `rows`, num_generations answers to each of eval_size of them."""
    usable = [row for row in rows if row["teacher_prompt_ids"]]
    if not usable:
        raise UserError("No row has a hint, so there is nothing to measure.")
    size = config.num_generations
    rows = rows_of_step(usable, min(config.eval_size, len(usable)), 1, config.seed)
    asked = [row for row in rows for _ in range(size)]
    hinted = [{**row, "prompt_ids": row["teacher_prompt_ids"]} for row in asked]
    metrics = {"questions": len(rows), "samples_each": size}
    rollouts = {}
    for name, these in (("student", asked), ("teacher", hinted)):
        torch.manual_seed(config.seed)
        out = roll_out(
            policy.model, tokenizer, these, config, reward_funcs, processes, sample=sample,
            agent=agent,
        )
        right = is_right(out.rewards_per_func, size).double().view(-1, size).mean(1).tolist()
        lengths = [len(row["prompt_ids"]) for row in these]
        low, high = interval(right, size)
        metrics |= {
            f"{name}_pass@1": sum(right) / len(right), f"{name}_pass@1_low": low,
            f"{name}_pass@1_high": high, f"{name}_prompt_mean": sum(lengths) / len(lengths),
            f"{name}_prompt_max": max(lengths),
            f"{name}_completion_mean": written(out).sum(1).double().mean().item(),
            f"{name}_truncated": out.truncated.double().mean().item(),
        }
        rollouts[name] = out
    out = rollouts["student"]
    references = [
        [*tokenizer(row["privileged_context"], add_special_tokens=False)["input_ids"],
         tokenizer.eos_token_id]
        for row in out.rows
    ]
    metrics |= gap_metrics(gaps(policy, out, config), out, references, size)
    if config.reads_siblings():
        gap, given = sibling_gaps(policy, tokenizer, out, config)
        of_siblings = gap_metrics(gap, out, references, size, given)
        metrics |= {f"sibling_{name}": value for name, value in of_siblings.items()}
    return metrics


def hint_table(m):
    """The lines that a user reads."""
    lines = [f"{m['questions']} questions, {m['samples_each']} answers to each, the same weights "
             "in both contexts"]
    lines += ["", f"{'':<9}{'pass@1':>8}  {'95 % interval':<17}{'prompt':>8}{'longest':>9}"
              f"{'answer':>8}{'cut off':>9}"]
    for name in ("student", "teacher"):
        low, high = m[f"{name}_pass@1_low"], m[f"{name}_pass@1_high"]
        lines.append(
            f"{name:<9}{m[f'{name}_pass@1']:>8.3f}  {f'[{low:.3f}, {high:.3f}]':<17}"
            f"{m[f'{name}_prompt_mean']:>8.1f}{m[f'{name}_prompt_max']:>9}"
            f"{m[f'{name}_completion_mean']:>8.1f}{m[f'{name}_truncated']:>9.1%}"
        )
    shorter = 1 - m["teacher_completion_mean"] / max(m["student_completion_mean"], 1e-9)
    if shorter > SHORTER:
        lines += [
            "", f"The teacher's answers are {shorter:.0%} shorter: a style that RLSD carries over.",
            "Where long answers are the better ones it costs more than it gains;",
            "rlsd_contrast_hints mends most of that.",
        ]
    lines += gap_lines(m, "") + [
        "gap: log P(token | question, hint) - log P(token | question). At an AUC of .5 it does not",
        "tell right answers from wrong ones. leave hint: the first token that is not the hint's.",
    ]
    if "sibling_auc" in m:
        lines += ["", "By siblings, as the options say, of the answers that have them:"]
        lines += gap_lines(m, "sibling_")
    return lines


def gap_lines(m, of):
    """The table of gap_metrics, whose names begin with `of`."""
    def number(name, form="{:+.3f}"):
        return "-" if m[of + name] is None else form.format(m[of + name])

    lines = ["", f"{'answers':<9}{'count':>8}{'gap/token':>11}{'leave hint':>12}{'before':>9}"
             f"{'there':>9}{'negative':>10}{'after':>9}"]
    for name in ("right", "wrong"):
        lines.append(
            f"{name:<9}{m[f'{of}{name}_samples']:>8}{number(f'{name}_gap'):>11}"
            f"{m[f'{of}{name}_leaving']:>12}{number(f'{name}_gap_before_leaving'):>9}"
            f"{number(f'{name}_gap_first_leaving'):>9}"
            f"{number(f'{name}_first_leaving_negative', '{:.0%}'):>10}"
            f"{number(f'{name}_gap_after_leaving'):>9}"
        )
    return [
        *lines, "", f"AUC of the gap, right against wrong: {number('auc', '{:.3f}')} over all "
        f"answers, {number('auc_within_question', '{:.3f}')} within a question "
        f"({m[f'{of}questions_with_both']} have both)",
    ]


def measure_hints(config):
    """check_hints of what a config names, on its training rows, whatever its objective reads."""
    if not config.eval_size:
        raise UserError("eval_size is 0, but says how many questions to measure; set it.")
    if config.rollout_func or config.environment_factory:
        raise UserError(
            "rlsd hints asks the data's questions as they stand, with the data's hints; leave out "
            "rollout_func and environment_factory."
        )
    functions, tools = load_reward_funcs(config.reward_funcs, config), load_tools(config)
    path = config.model_name_or_path
    tokenizer, processor = load_tokenizer(path), load_processor(path)
    config = dataclasses.replace(
        config, objective="rlsd", rlsd_lambda=0.5, use_vllm=False, hint_func=None
    )
    agent = agent_of(config, tokenizer, tools)
    functions += agent.reward_funcs if agent else []
    rows, _ = load_data(config, tokenizer, processor=processor, toolbox=tools)
    require_scorable(functions, rows)
    processes = Processes(config)
    model = load_model(
        path, config.device, dtype=torch.bfloat16 if config.bf16 else torch.float32,
        attn_implementation=config.attn_implementation,
    )
    policy = open_policy(model, tokenizer.pad_token_id, config)
    require_room(model, rows, config)
    sample = choose_sampler(model, tokenizer, config, processes)
    return check_hints(policy, tokenizer, rows, config, functions, processes, sample, agent) | {
        "model": path, "train_dataset": config.train_dataset, "seed": config.seed,
        "hint_placement": config.hint_placement,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
