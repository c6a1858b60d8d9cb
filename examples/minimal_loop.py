"""RLSD (arXiv 2604.03128) in plain PyTorch: the whole training loop, to copy into your own trainer.

    python examples/minimal_loop.py        # on one CPU core, in well under two minutes

Task: the running sums mod 7 of 4 to 7 digits, "3 4 5 6 _ _ _ =" -> "3 0 5 4"; the reward sees the
last sum alone. Privileged context: all sums. The tiny model first learns from sums that err on
purpose, and is right less than half of the time; RLSD then takes it past three quarters.
"""

import copy
import random

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from rlsd_kernels import RLSDLossConfig, aggregation_weights, fused_linear_rlsd_loss

PAD, EOS, BLANK, ANSWER, HINT = range(7, 12)  # a digit is its own token id
NUM_QUESTIONS, NUM_GENERATIONS, MAX_COMPLETION_LENGTH = 8, 8, 9
RLSD_LAMBDA, DECAY_STEPS, TEACHER_SYNC_STEPS = 0.5, 50, 10
CONFIG = RLSDLossConfig(rlsd_reweight_clip_range=0.2, epsilon=0.2, epsilon_high=0.28)


def make_problem(error_rate=0.0):
    """(prompt, teacher's prompt, solution) as token ids; a wrong sum misleads those after it."""
    digits, total, solution = random.choices(range(7), k=random.randint(4, 7)), 0, []
    for digit in digits:
        total = random.randrange(7) if random.random() < error_rate else (total + digit) % 7
        solution.append(total)
    prompt = [*digits, *[BLANK] * (7 - len(digits)), ANSWER]
    # The teacher's prompt is the student's plus one insertion, so only the hint moves log-probs.
    return prompt, [HINT, *solution, *prompt], solution


def left_pad(prompts):
    """Token ids and mask, (B, P) each; every prompt ends where its completion begins."""
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    return ids, (ids != PAD).long()


def hidden_states(model, prompts, completion_ids):
    """(B, T, H): state t predicts completion_ids[:, t], so it stands one position before it."""
    ids, mask = left_pad(prompts)
    # What follows EOS needs no mask here: nothing before it sees it, and its loss weight is 0.
    mask = torch.cat([mask, torch.ones_like(completion_ids)], 1)
    ids, positions = torch.cat([ids, completion_ids], 1), (mask.cumsum(1) - 1).clamp(min=0)
    output = model.model(ids, attention_mask=mask, position_ids=positions)
    return output.last_hidden_state[:, -completion_ids.shape[1] - 1 : -1]


def warm_start(steps):
    """Stands for the weights you load: 0.1 M parameters that sum, with errors, and read hints."""
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=16, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=4, intermediate_size=192, initializer_range=0.06,
        tie_word_embeddings=True, pad_token_id=PAD, eos_token_id=EOS,
    ))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1)
    for _ in range(steps):
        problems = (make_problem(error_rate=0.2) for _ in range(48))
        prompts, teacher_prompts, solutions = zip(*problems, strict=True)
        labels = torch.tensor([s + [EOS] + [PAD] * (7 - len(s)) for s in solutions * 2])
        logits = model.lm_head(hidden_states(model, prompts + teacher_prompts, labels))
        torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=PAD).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def main(warm_up_steps=250, max_steps=80, seed=0):
    set_seed(seed)
    print("Warm start; then expect an accuracy that climbs from below a half past three quarters.")
    model, accuracy = warm_start(warm_up_steps).eval(), []  # dropout would be another policy
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, max_steps + 1):
        problems = [p for _ in range(NUM_QUESTIONS) for p in [make_problem()] * NUM_GENERATIONS]
        prompts, teacher_prompts, solutions = zip(*problems, strict=True)
        # Plain samples: with top_k or top_p they would not be draws from the policy of the loss.
        ids, attention_mask = left_pad(prompts)
        completion_ids = model.generate(
            ids, attention_mask=attention_mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=MAX_COMPLETION_LENGTH, eos_token_id=EOS, pad_token_id=PAD,
        )[:, ids.shape[1] :]
        ends = completion_ids == EOS
        mask = ends.cumsum(1) - ends.long() == 0  # up to the first EOS, a token like any other
        rows = zip(completion_ids, mask, solutions, strict=True)
        rewards = [float(ids[live].tolist()[-2:] == [s[-1], EOS]) for ids, live, s in rows]
        accuracy.append(sum(rewards) / len(rewards))  # of questions never seen before
        groups = torch.tensor(rewards, dtype=torch.float64).view(-1, NUM_GENERATIONS)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
        advantages[(groups == groups[:, :1]).all(1)] = 0.0  # rounding / 1e-6 would be a signal
        rlsd_lambda, teacher_inputs = RLSD_LAMBDA * max(1 - step / DECAY_STEPS, 0.0), {}
        if rlsd_lambda > 0:  # at 0 the loss is GRPO's and needs no teacher
            with torch.no_grad():  # which reads the very same token ids
                states = hidden_states(teacher, teacher_prompts, completion_ids)
            teacher_inputs = {"teacher_hidden": states, "teacher_weight": teacher.lm_head.weight}
        out = fused_linear_rlsd_loss(
            hidden_states(model, prompts, completion_ids), model.lm_head.weight, completion_ids,
            advantages.flatten(), **teacher_inputs, rlsd_lambda=rlsd_lambda, config=CONFIG,
            loss_weights=aggregation_weights(mask, "dapo"),
        )  # on-policy; a second step on this rollout takes old_log_probs=out.log_probs of the first
        if advantages.any():  # no signal, no step: not one of momentum alone either
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % TEACHER_SYNC_STEPS == 0:
            teacher.load_state_dict(model.state_dict())
            recent = sum(accuracy[-TEACHER_SYNC_STEPS:]) / TEACHER_SYNC_STEPS
            print(f"step {step:>3}  accuracy {recent:.2f}  lambda {rlsd_lambda:.2f}")
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
