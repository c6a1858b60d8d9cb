"""Group rollouts with the model's own generate, and hidden states of sampled tokens.

Prompts are padded on the left, completions on the right, so that one column is one position of
the response in both the student's and the teacher's context, EOS included.
"""

from typing import NamedTuple

import torch

from .config import UserError
from .rewards import score


class Rollout(NamedTuple):
    """B completions; completion_ids and mask are (B, T), mask covers the first EOS and no more."""

    rows: list
    completion_ids: torch.Tensor
    mask: torch.Tensor
    texts: list
    truncated: torch.Tensor  # (B,) bool: no EOS within max_completion_length
    rewards: torch.Tensor  # (B,) fp64, weighted sum over reward functions
    rewards_per_func: torch.Tensor  # (B, F) fp64, NaN where a function returned None


class Head(NamedTuple):
    """The LM head of a model, in the terms of the fused loss."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    final_logit_softcapping: float | None


def head_of(model):
    """The model's head, verified against its own logits; refuses what it cannot reproduce."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None or getattr(layer, "weight", None) is None:
        raise UserError(f"{type(model).__name__} has no linear LM head to fuse the loss over.")
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    cap = getattr(config, "final_logit_softcapping", None)
    head = Head(layer.weight, getattr(layer, "bias", None), scale, cap)
    ids = torch.arange(1, 9, device=layer.weight.device).remainder(layer.weight.shape[0])[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits.float()
        hidden = hidden_states(model, ids, torch.ones_like(ids))
        got = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * scale
        got = got if cap is None else cap * torch.tanh(got / cap)
    model.train(training)
    error = (want - got).abs().max().item()
    if not error <= 1e-3 * max(1.0, want.abs().max().item()):
        raise UserError(
            f"The LM head of {type(model).__name__} computes something beyond weight, bias, scale "
            f"and softcap (its logits differ by {error:.3g}), so the fused loss cannot stand in."
        )
    return head


def eos_ids(model, tokenizer):
    """Every token id that ends a completion."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [*ids, tokenizer.eos_token_id]
    if not ids:
        raise UserError("Neither model nor tokenizer names an EOS token, so no completion can end.")
    return ids


def require_room(model, rows, config):
    """A prompt and its completion must fit the positions that the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row in rows:
        longest = max(len(row["prompt_ids"]), len(row["teacher_prompt_ids"] or []))
        if limit is not None and longest + config.max_completion_length > limit:
            raise UserError(
                f"Row {row['_source']} has a prompt of {longest} tokens, which with "
                f"max_completion_length {config.max_completion_length} exceeds the model's "
                f"{limit} positions; lower max_completion_length, max_prompt_length or "
                "max_teacher_prompt_length."
            )


def left_pad(sequences, pad_id, device):
    """(B, P) ids and mask of token lists, right-aligned."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(sequences):
        ids[i, width - len(tokens) :] = torch.tensor(tokens)
        mask[i, width - len(tokens) :] = 1
    return ids.to(device), mask.to(device)


def hidden_states(model, input_ids, attention_mask):
    """Last hidden states (B, L, H) of the trunk; positions count unpadded tokens."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
        use_cache=False,
    ).last_hidden_state


def completion_hidden(model, prompts, completion_ids, mask, pad_id):
    """Hidden states (B, T, H) that predict each completion token after each prompt (token lists).

    Completion ids are taken as they are, never re-tokenised.
    """
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, completion_ids.device)
    hidden = hidden_states(
        model, torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, mask.long()], 1)
    )
    start = prompt_ids.shape[1] - 1
    return hidden[:, start : start + completion_ids.shape[1]]


@torch.no_grad()
def generate(model, tokenizer, prompts, config, *, greedy=False):
    """One completion per prompt: ids (B, T) right-padded, mask (B, T), truncated (B,)."""
    ends = eos_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    temperature = 1.0 if greedy else config.temperature
    device = model.get_input_embeddings().weight.device
    training, own = model.training, model.generation_config
    model.eval()
    # The model's own penalties and filters would sample another policy than the one we score.
    model.generation_config = type(own)()
    pieces = []
    try:
        for i in range(0, len(prompts), config.rollout_batch_size):
            ids, mask = left_pad(prompts[i : i + config.rollout_batch_size], pad_id, device)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=config.max_completion_length,
                pad_token_id=pad_id, eos_token_id=ends, do_sample=not greedy,
                temperature=temperature, top_k=0,
            )
            pieces.append(out[:, ids.shape[1] :])
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(
            "The model's token probabilities are not finite, so it cannot be sampled from; lower "
            "learning_rate and continue from an earlier checkpoint."
        ) from error
    finally:
        model.generation_config = own
        model.train(training)
    width = max(p.shape[1] for p in pieces)
    ids = torch.cat([
        torch.nn.functional.pad(p, (0, width - p.shape[1]), value=pad_id) for p in pieces
    ])
    is_end = torch.isin(ids, torch.tensor(ends, device=device))
    return ids, is_end.cumsum(1) - is_end.long() == 0, ~is_end.any(1)


def roll_out(model, tokenizer, rows, config, reward_funcs, *, greedy=False):
    """Sample and score one completion per row (repeat a row to get a group)."""
    ids, mask, truncated = generate(
        model, tokenizer, [row["prompt_ids"] for row in rows], config, greedy=greedy
    )
    lists = [line[keep].tolist() for line, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    texts = tokenizer.batch_decode(lists, skip_special_tokens=True)
    per_func, rewards = score(reward_funcs, config.reward_weights, rows, texts, lists)
    return Rollout(rows, ids, mask, texts, truncated, rewards, per_func)


def leak_rate(texts, markers):
    """Share of texts that contain any marker of the privileged context."""
    return sum(any(m in text for m in markers) for text in texts) / max(1, len(texts))


def evaluate(model, tokenizer, rows, config, reward_funcs, seed):
    """Held-out pass@1, greedy and sampled: share whose first reward function gives full marks, 1.

    The random state of training is left as it was.
    """
    metrics = {}
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for name, greedy in (("greedy", True), ("sampled", False)):
            out = roll_out(model, tokenizer, rows, config, reward_funcs, greedy=greedy)
            full_marks = out.rewards_per_func[:, 0] >= 1
            metrics[f"eval/pass@1_{name}"] = full_marks.double().mean().item()
            metrics[f"eval/reward_{name}"] = out.rewards.mean().item()
            if config.leak_markers:
                metrics[f"eval/leak_rate_{name}"] = leak_rate(out.texts, config.leak_markers)
    metrics["eval/completion_length"] = out.mask.sum(1).double().mean().item()
    return metrics


def token_texts(tokenizer, ids):
    """Text of each token, so that the pieces joined read like the completion.

    A character that spans several tokens belongs to the last of them, the others are empty.
    """
    pieces, start, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, text = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
        else:
            pieces.append(text[len(before) :])
            start, shown = shown, end
    return pieces
