"""How completions are drawn: one of three samplers, each called as generate is.

`generate` is the model's own: padded batches that wait for their longest completion, prompts padded
on the left. `generate_batch` is transformers' continuous batching: a finished sequence makes room
for the next, in a paged cache. vllm_sampler.py runs another engine on copies of the weights. Each
says with what log-prob it drew every token, which the trainer compares with its own pass.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import ContinuousBatchingConfig

from ..config import UserError
from ..policy.models import require_own_positions
from ..policy.packing import left_pad
from ..tasks.images import image_inputs
from ..tasks.prompts import end_of_turn


class Samples(NamedTuple):
    """B completions; (B, T) but for truncated (B,). The mask covers the first EOS and no more."""

    completion_ids: torch.Tensor  # padded on the right
    mask: torch.Tensor
    truncated: torch.Tensor  # bool: no EOS within max_completion_length
    log_probs: torch.Tensor | None  # fp32, of each token as it was drawn; 0 where masked, NaN where
    # the sampler gave none, None where it took the most probable tokens


def named_eos_ids(model, tokenizer):
    """Every EOS that model or tokenizer names."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def eos_ids(model, tokenizer):
    """Every token id that ends a completion: EOS tokens, and the chat template's end of turn."""
    ids, (_, end) = named_eos_ids(model, tokenizer), end_of_turn(tokenizer)
    if end is not None and end not in ids:
        ids = [*ids, end]
    if not ids:
        raise UserError("Neither model nor tokenizer names an EOS token, so no completion can end.")
    rows = len(model.get_output_embeddings().weight)
    if min(ids) >= rows:
        raise UserError(
            f"The LM head has {rows} rows and so never says the EOS token, id {min(ids)}: no "
            "completion can end; resize the embedding and save the model, or name another EOS."
        )
    return ids


def require_room(model, rows, config):
    """A prompt and its completion must fit the embedding and positions of the model."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    furthest, known = 0, len(model.get_input_embeddings().weight)
    for row in rows:
        lists = (row.get(f"{name}_ids") for name in ("prompt", "teacher_prompt", "_reference"))
        largest = max(max(ids) for ids in lists if ids)
        if largest >= known:
            raise UserError(
                f"Row {row['_source']} has a token with id {largest}, past the {known} rows of the "
                f"embedding of {type(model).__name__}, whose tokenizer knows tokens that it does "
                "not; resize the embedding (resize_token_embeddings) and save the model, or use "
                "its own tokenizer."
            )
        longest = max(len(row["prompt_ids"]), len(row["teacher_prompt_ids"] or []))
        if config.reads_siblings():  # of which one comes before the question
            longest = max(longest, row["_around_sibling"] + config.max_completion_length)
        if limit is not None and longest + config.max_completion_length > limit:
            raise UserError(
                f"Row {row['_source']} has a prompt of {longest} tokens, which with "
                f"max_completion_length {config.max_completion_length} exceeds the {limit} "
                f"positions of {type(model).__name__}; lower max_completion_length, "
                "max_prompt_length or max_teacher_prompt_length."
            )
        furthest = max(furthest, longest + config.max_completion_length)
    require_own_positions(model, furthest)


_LOGGER = logging.getLogger("ContinuousBatchingLogger")


def filters(config):
    """What temperature, top_k, top_p and min_p do to scores, in the order of transformers."""
    wanted = [(TemperatureLogitsWarper, config.temperature, config.temperature != 1),
              (TopKLogitsWarper, config.top_k, config.top_k), (TopPLogitsWarper, config.top_p,
              config.top_p < 1), (MinPLogitsWarper, config.min_p, config.min_p)]
    return [kind(value) for kind, value, changes in wanted if changes]


class DrawnLogProbs(LogitsProcessor):
    """Notes the log-prob of every drawn token; of (B, V) scores one tensor stays, never T.

    The last of the processors: it sees the distribution that is sampled from.
    """

    def __init__(self):
        self.scores, self.columns = None, []

    def __call__(self, input_ids, scores):
        self.note(input_ids)
        self.scores = scores
        return scores

    def note(self, input_ids):
        """The last ids were drawn from the scores seen before them."""
        if self.scores is not None:
            scores = self.scores.float()
            drawn = scores.gather(1, input_ids[:, -1:]).squeeze(1)
            self.columns.append(drawn - scores.logsumexp(1))


def progress_bar(total):
    """A bar of so many completions on the line below the last step's, while one looks at it.

    Elsewhere than on the main process's terminal it is None inside `with`.
    """
    main = os.environ.get("RANK", "0") == "0"
    if not main or sys.stdout is None or not sys.stdout.isatty():
        return contextlib.nullcontext()
    return tqdm(
        total=total, desc="sampling", unit=" completions", leave=False, position=1, delay=1,
        miniters=0, dynamic_ncols=True, file=sys.stdout,
    )


class Watch(StoppingCriteria):
    """Tells the bar how far a batch is, after every token; it stops nothing."""

    def __init__(self, bar, ends, start, limit):
        self.bar, self.ends, self.start, self.limit, self.done = bar, ends, start, limit, None

    def __call__(self, input_ids, scores, **_):
        ended = torch.isin(input_ids[:, -1], torch.tensor(self.ends, device=input_ids.device))
        nothing = torch.zeros_like(ended)
        before = nothing if self.done is None else self.done
        self.done = before | ended
        self.bar.set_postfix_str(
            f"token {input_ids.shape[1] - self.start}/{self.limit}", refresh=False
        )
        self.bar.update((self.done.sum() - before.sum()).item())
        return nothing


def placeholders_of(model):
    """Ids that stand for images or videos: no pass over a completion with one could be made."""
    names = ("image_token_id", "video_token_id")
    return [getattr(model.config, n) for n in names if getattr(model.config, n, None)]


@contextlib.contextmanager
def _sampling(model):
    """Eval mode, and no load-balancing loss of experts: nobody reads it, and it wants a mask."""
    training, text = model.training, model.config.get_text_config()
    balanced = getattr(text, "output_router_logits", None)
    model.eval()
    if balanced:
        text.output_router_logits = False
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(
            "The model's token probabilities are not finite, so it cannot be sampled from; lower "
            "learning_rate and continue from an earlier checkpoint."
        ) from error
    finally:
        if balanced:
            text.output_router_logits = balanced
        model.train(training)


def _prefilled(model, ids, mask):
    """A cache of all but the last token of left-padded rows, equal ones computed once, or None."""
    rows, owners = torch.cat([ids, mask], 1).unique(dim=0, return_inverse=True)
    if len(rows) == len(ids) or ids.shape[1] == 1:
        return None
    ids, seen = rows[:, : ids.shape[1] - 1], rows[:, ids.shape[1] : -1]
    cache = DynamicCache(config=model.config.get_text_config())
    model(
        input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True,
        position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        **{"logits_to_keep": 1} if model._supports_logits_to_keep() else {},
    )
    cache.batch_select_indices(owners)
    return cache


def widen(part, width, value):
    return torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value)


@torch.no_grad()
def generate(model, tokenizer, prompts, config, *, images=None, greedy=False, share=True):
    """Samples of one completion per prompt (token lists), by the model's own generate.

    images: PromptImages or None of each prompt. Placeholders of images are never sampled.
    share: equal prompts of a batch are computed once, if share_prompts allows it (by a model that
    takes no images, whose rotary positions depend on what it saw before).
    """
    ends, placeholders = eos_ids(model, tokenizer), placeholders_of(model)
    pad_id = tokenizer.pad_token_id
    device = model.get_input_embeddings().weight.device
    own = model.generation_config
    # The model's own penalties and filters would sample another policy than the one we score.
    model.generation_config = type(own)()
    pieces, log_probs = [], []
    try:
        with _sampling(model), progress_bar(len(prompts)) as bar:
            for i in range(0, len(prompts), config.rollout_batch_size):
                ids, mask = left_pad(prompts[i : i + config.rollout_batch_size], pad_id, device)
                seen = (images or [None])[i : i + config.rollout_batch_size]
                extra = {"suppress_tokens": placeholders} if placeholders else {}
                if any(seen):
                    extra |= image_inputs(seen, ids, placeholders[0])
                elif share and not placeholders and config.share_prompts != "false":
                    extra["past_key_values"] = _prefilled(model, ids, mask)
                drawn, watch = DrawnLogProbs(), []
                if bar is not None:
                    watch = [Watch(bar, ends, ids.shape[1], config.max_completion_length)]
                out = model.generate(
                    input_ids=ids, attention_mask=mask, **extra,
                    max_new_tokens=config.max_completion_length, pad_token_id=pad_id,
                    eos_token_id=ends, do_sample=not greedy, top_k=0,
                    repetition_penalty=config.repetition_penalty,
                    logits_processor=[] if greedy else [*filters(config), drawn],
                    stopping_criteria=watch,
                )
                for one in watch:  # the rest met the limit
                    bar.update(len(ids) - one.done.sum().item())
                pieces.append(out[:, ids.shape[1] :])
                if not greedy:
                    drawn.note(out)
                    log_probs.append(torch.stack(drawn.columns, 1))
    finally:
        model.generation_config = own
    width = max(p.shape[1] for p in pieces)
    ids = torch.cat([widen(p, width, pad_id) for p in pieces])
    is_end = torch.isin(ids, torch.tensor(ends, device=device))
    mask = is_end.cumsum(1) - is_end.long() == 0
    drawn = None
    if not greedy:
        joined = torch.cat([widen(p, width, 0.0) for p in log_probs])
        drawn = torch.where(mask, joined, 0.0)
    return Samples(ids, mask, ~is_end.any(1), drawn)


@torch.no_grad()
def generate_batch(model, tokenizer, prompts, config, *, images=None, greedy=False):
    """The same by transformers' continuous batching, rollout_batch_size sequences at a time.

    images: none can be given.
    """
    ends, device = eos_ids(model, tokenizer), model.get_input_embeddings().weight.device
    if device.type == "cuda":  # the cache takes a share of what is free
        torch.cuda.empty_cache()
    attention = model.config._attn_implementation
    try:
        with _sampling(model):
            manager = model.init_continuous_batching(
                GenerationConfig(
                    eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
                    **{} if greedy else {
                        "do_sample": True, "temperature": config.temperature,
                        "top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p,
                    },
                ),
                _engine_options(config),
            )
            results = _results(manager, prompts, config.max_completion_length)
    finally:
        if model.config._attn_implementation != attention:  # it has its own word for eager
            model.set_attn_implementation(attention)
    return samples_of_lists(
        [r.generated_tokens for r in results], None if greedy else [r.logprobs for r in results],
        ends, tokenizer.pad_token_id, device,
    )


def _engine_options(config):
    options = {"return_logprobs": True, "max_requests_per_batch": config.rollout_batch_size}
    if "auto_switch_to_flash" in {f.name for f in dataclasses.fields(ContinuousBatchingConfig)}:
        options["auto_switch_to_flash"] = False  # attn_implementation says what runs, fp32 too
    return ContinuousBatchingConfig(**options | config.transformers_continuous_batching_config)


def _results(manager, prompts, max_new_tokens):
    """The engine's results in the order of the prompts; its errors, raised here, not in its thread.

    All requests wait before it starts: how they are batched, and so what is drawn, then depends on
    no race between two threads.
    """
    done, names = {}, prompts
    _LOGGER.setLevel("CRITICAL")  # it prints the traceback of an error that is raised here
    try:
        manager.warmup()
        names = manager.add_requests(prompts, max_new_tokens=max_new_tokens)
        manager.start()
        with progress_bar(len(names)) as bar:
            while len(done) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    done[result.request_id] = result
                    if bar is not None:
                        bar.update()
                elif result is None and not manager.is_running():
                    break
        fatal = manager.background_thread_status.fatal_error
    finally:
        manager.stop(block=True, hard_stop=len(done) < len(names))
        manager.destroy()
    said = [r.error for r in done.values() if r.error]
    if fatal is None and (said or len(done) < len(names)):
        fatal = RuntimeError(f"Continuous batching failed: {said[0] if said else 'it stopped'}")
    if fatal is not None:
        raise fatal
    return [done[name] for name in names]


def samples_of_lists(completions, log_probs, ends, pad_id, device):
    """Samples from token lists and lists of their log-probs (None in one: not known), or None."""
    width, kept = max(map(len, completions)), []
    for ids in completions:
        at = next((t for t, token in enumerate(ids) if token in ends), None)
        kept.append(len(ids) if at is None else at + 1)
    shape = (len(completions), width)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    drawn = torch.zeros(shape)
    for i, (line, n) in enumerate(zip(completions, kept, strict=True)):
        ids[i, :n] = torch.tensor(line[:n])
        if log_probs is not None:
            given = [float("nan" if v is None else v) for v in log_probs[i][:n]]
            drawn[i, :n] = torch.tensor(given)
    mask = torch.arange(width)[None] < torch.tensor(kept)[:, None]
    truncated = ~(torch.isin(ids, torch.tensor(ends)) & mask).any(1)
    out = (ids, mask, truncated, None if log_probs is None else drawn)
    return Samples(*(x if x is None else x.to(device) for x in out))


def sampler_refusal(sample, model, tokenizer, config, *, limit=None):
    """Why `sample` cannot draw from the policy that is trained, or None.

    On prompts of many lengths its log-probs must be those of passes over each sequence alone: mask
    and cache may not change what a row means. Random generators stay where they were.
    """
    device, rows = model.device, len(model.get_output_embeddings().weight)
    # What the filters keep hangs on rounding where probabilities are close; the passes must agree.
    trial = dataclasses.replace(
        config.unfiltered(), max_completion_length=4, soft_punish_cache=None, rollout_batch_size=6
    )
    prompts = [[3, 4, 5], [6], [7, 6, 5, 4, 3, 7], [4, 3], [3, 4, 5], [4, 3]]
    prompts = [[token % rows for token in prompt] for prompt in prompts]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            drawn = sample(model, tokenizer, prompts, trial)
    except UserError:
        raise
    except (
        AttributeError, ImportError, KeyError, MemoryError, RuntimeError, TypeError, ValueError
    ) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0].rstrip('.')}"
    errors, largest = [], 1.0
    for prompt, line, keep, got in zip(prompts, *drawn[:2], drawn.log_probs, strict=True):
        ids = torch.cat([torch.tensor(prompt, device=line.device), line[keep]])
        with torch.no_grad(), _sampling(model):
            logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float()
        largest = max(largest, logits.abs().max().item())
        logits[:, placeholders_of(model)] = -torch.inf
        want = (logits / config.temperature).log_softmax(-1).gather(1, line[keep][:, None])
        errors.append((got[keep] - want[:, 0]).abs())
    # In 16 bits two orders of one sum move a log-prob by some hundredths; a wrong mask, by more.
    if limit is None:
        limit = 0.25 if model.dtype.itemsize == 2 else 1e-3 * largest
    error = torch.cat(errors).nanmean().item()
    if error <= limit / min(1.0, config.temperature):
        return None
    return f"its log-probs deviate from the model's by {error:.2g} on prompts of many lengths"


def continuous_batching_refusal(model, tokenizer, config):
    """Why continuous batching cannot sample from the model, or None; a tiny cache holds the trial.
    """
    if placeholders_of(model):
        return "it takes no images, and this model does"
    if config.repetition_penalty != 1:
        return "it has no repetition_penalty"
    return sampler_refusal(generate_batch, model, tokenizer, dataclasses.replace(
        config, transformers_continuous_batching_config={
            **config.transformers_continuous_batching_config, "num_blocks": 8,
            "max_batch_tokens": 64,
        },
    ))


def choose_sampler(model, tokenizer, config, processes, log=print):
    """The function to sample by, called as generate is; `log` gets one line on a choice.

    Raises UserError, one sentence, where a sampler that was asked for cannot run.
    """
    log = log if processes.main else lambda *_: None
    text, end = end_of_turn(tokenizer)
    if text and end is None:
        log(f"The chat template ends a turn by {text!r}, which is no control token: completions "
            "end at an EOS alone.")
    elif end is not None and end not in named_eos_ids(model, tokenizer):
        log(f"Completions end at {text!r} too, the chat template's end of turn, which is no EOS of "
            "the model.")
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(config, name) and processes.sharded:
            raise UserError(f"{name} cannot run under FSDP2, whose weights it does not gather.")
    if config.use_vllm:
        if placeholders_of(model):
            raise UserError("use_vllm samples from text alone, but the model takes images.")
        from .vllm_sampler import VLLMSampler, halved

        ends, name = eos_ids(model, tokenizer), type(model).__name__
        engine = VLLMSampler(model, tokenizer, config, ends)

        def drawn(model, tokenizer, prompts, config, *, images=None, greedy=False):
            return samples_of_lists(
                *engine.sample(prompts, config, greedy), ends, tokenizer.pad_token_id,
                model.get_input_embeddings().weight.device,
            )

        def reason(limit=0.25):  # kernels and dtype of the engine are its own
            return sampler_refusal(drawn, model, tokenizer, config, limit=limit)

        with engine.synced():
            if why := reason():
                raise UserError(
                    f"vLLM does not sample from {name} as it is trained ({why}); give a server "
                    "--logprobs-mode processed_logprobs, or set use_vllm to false."
                )
        with halved(model), engine.synced():
            if why := reason(0.1):  # rounding is less where logits are smaller
                raise UserError(
                    f"vLLM keeps old weights of {name} when it is sent new ones ({why}); install "
                    "another release of vLLM, or set use_vllm to false."
                )

        def by_vllm(model, tokenizer, prompts, config, *, images=None, greedy=False):
            with engine.synced():
                if why := reason():
                    raise UserError(
                        f"vLLM does not hold today's weights of {name} ({why}); resume from the "
                        "last checkpoint, with use_vllm false if it happens again."
                    )
                return drawn(model, tokenizer, prompts, config, greedy=greedy)

        log(f"Sampling by vLLM, vllm_mode {config.vllm_mode}.")
        return by_vllm
    wanted, why_not = config.use_transformers_continuous_batching, ""
    on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
    if wanted or wanted is None and on_gpu and not processes.sharded:
        reason = continuous_batching_refusal(model, tokenizer, config)
        if reason is None:
            log("Sampling by transformers' continuous batching.")
            return generate_batch
        if wanted:
            raise UserError(
                f"Continuous batching cannot sample from {type(model).__name__} ({reason}); set "
                "use_transformers_continuous_batching to false."
            )
        why_not = f", as continuous batching cannot: {reason}"
    if on_gpu or wanted is not None:  # elsewhere there was nothing to choose
        log(f"Sampling by the model's own generate{why_not}.")
    reason = sampler_refusal(generate, model, tokenizer, config)
    alone = functools.partial(generate, share=False)
    if reason and not sampler_refusal(alone, model, tokenizer, config):
        log(f"Sampling computes a group's prompt for every completion: {reason}.")
        return alone
    if reason:
        raise UserError(
            f"{type(model).__name__} cannot be sampled from by its own generate ({reason}); choose "
            "another attn_implementation or model."
        )
    return generate
