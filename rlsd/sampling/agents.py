"""Completions of several turns: the model writes, tools answer, the model goes on.

A completion is one row of tokens, `tool_mask` True where the model wrote them. Its ids are what was
sampled, never tokenised again; between them stands what the chat template writes for tool messages
and the start of the next turn, after the end of an assistant's turn. A turn calls tools where the
tokenizer's response_template finds calls in it; a turn without one is the last.
"""

import contextlib
import copy
import itertools
import math
from typing import NamedTuple

import torch

from ..config import UserError
from ..packages import package
from ..tasks.data import tokenize_rows
from ..tasks.images import apply_template
from ..tasks.prompts import end_of_turn
from ..tasks.rewards import imported, told
from ..tasks.tools import UNKNOWN, Episode
from .samplers import Samples, eos_ids, require_room

PROBE = {"name": "probe_tool", "arguments": {"probe_key": "probe_value"}}
ASKED = {"role": "user", "content": "Asked"}
# What rollout_func returns for the trainer; the rest is for the reward functions.
OF_ROLLOUT = ("prompt_ids", "completion_ids", "logprobs", "env_mask", "teacher_prompt_ids",
              "feedback")


class Played(NamedTuple):
    """B completions of an agent."""

    rows: list  # with what the environments' resets put at the end of the question
    samples: Samples  # tools' tokens included, with a log-prob of 0
    tool_mask: torch.Tensor  # (B, T) bool: what the model wrote
    texts: list  # that alone, as text
    messages: list  # of assistant and tools, as reward functions get them
    calls: torch.Tensor | None  # (B, 2) calls of tools, and how many failed; rollout_func's: None
    feedback: list | None  # from rollout_func; that of an environment stands in its Episode
    extra: list  # columns that rollout_func adds to each


class Agent:
    """How the completions of a run are played: by a Toolbox in turns, or by rollout_func."""

    def __init__(self, config, tokenizer, toolbox, trainer=None):
        self.toolbox, self.trainer = toolbox, trainer
        self.rollout_func = config.rollout_func and imported(config.rollout_func, "rollout_func")
        self.reward_funcs = toolbox.reward_funcs if toolbox else []
        if toolbox:
            require_tools(tokenizer)

    def episodes(self, rows):
        """A context: what each of the rows' completions may use."""
        if self.toolbox:
            return self.toolbox.episodes(rows)
        return contextlib.nullcontext([Episode({}) for _ in rows])

    def play(self, episodes, sample, model, tokenizer, rows, config, *, greedy, need_hint):
        """Played: one completion per row."""
        if self.rollout_func:
            return played_by_function(self.rollout_func, self.trainer, model, tokenizer, rows)
        return play(
            self.toolbox, episodes, sample, model, tokenizer, rows, config, greedy=greedy,
            need_hint=need_hint,
        )


def agent_of(config, tokenizer, toolbox, trainer=None):
    """The Agent of a config, None where completions are single turns of the model alone."""
    if toolbox or config.rollout_func:
        return Agent(config, tokenizer, toolbox, trainer)
    return None


class _Line:
    """One completion as it grows."""

    def __init__(self):
        self.ids, self.tool_mask, self.log_probs, self.messages, self.texts = [], [], [], [], []
        self.calls = self.failures = 0
        self.truncated = False

    def add(self, ids, log_probs, by_model):
        self.ids += ids
        self.log_probs += log_probs
        self.tool_mask += [by_model] * len(ids)


def require_tools(tokenizer):
    """UserError, a sentence, where chat template or tokenizer cannot carry calls of tools."""
    call = {"type": "function", "function": PROBE}
    conversation = [
        ASKED, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": PROBE["name"], "content": "probe_content"},
    ]
    try:
        text = apply_template(tokenizer, conversation, None)
    except UserError:
        text = ""
    parts = PROBE["name"], "probe_key", "probe_value", "probe_content"
    if tokenizer.chat_template is None or not all(part in text for part in parts):
        raise UserError(
            "The model's chat template cannot show calls of tools and their answers; use a model "
            "whose template can, or leave out tools and environment_factory."
        )
    if end_of_turn(tokenizer)[1] is None:
        raise UserError(
            "The model's chat template ends a turn by no control token, after which a tool's "
            "answer could stand; leave out tools and environment_factory."
        )
    if getattr(tokenizer, "response_template", None) is None:
        _add_response_template(tokenizer)


def _add_response_template(tokenizer):
    try:
        from trl.chat_template_utils import add_response_schema

        add_response_schema(tokenizer)
    except (ImportError, ValueError) as error:
        need = f"install {package('trl')}, which knows those of many models" if isinstance(
            error, ImportError) else "set it and save the tokenizer, as transformers documents"
        raise UserError(
            "The tokenizer has no response_template, by which transformers finds calls of tools "
            f"in an answer; {need}."
        ) from None


def play(toolbox, episodes, sample, model, tokenizer, rows, config, *, greedy, need_hint):
    """Played: one completion per row, in as many turns as it calls tools.

    episodes: toolbox.episodes(rows). sample: what choose_sampler returned.
    """
    rows = [
        _observed(row, episode.observation, tokenizer, config, toolbox, need_hint)
        for row, episode in zip(rows, episodes, strict=True)
    ]
    require_room(model, rows, config)
    lines, open_ = [_Line() for _ in rows], list(range(len(rows)))
    most = config.max_tool_calling_iterations
    for turn in itertools.count():
        _take_turn(lines, open_, sample, model, tokenizer, rows, config, greedy)
        going = []
        for i in open_:
            message = _read(lines[i], rows[i], tokenizer)
            lines[i].messages.append(message)
            calls = message.get("tool_calls")
            if lines[i].truncated or not calls or most is not None and turn >= most:
                continue
            if _answer(lines[i], calls, episodes[i], rows[i], toolbox, tokenizer, config):
                going.append(i)
        open_ = going
        if not open_:
            break
    device = model.get_input_embeddings().weight.device
    return Played(
        rows, *_tensors(lines, tokenizer.pad_token_id, device, greedy),
        ["\n".join(line.texts) for line in lines], [line.messages for line in lines],
        torch.tensor([[line.calls, line.failures] for line in lines]),
        None, [{} for _ in lines],
    )


def _observed(row, observation, tokenizer, config, toolbox, need_hint):
    """The row with the text that reset returned at the end of its question."""
    if not observation:
        return row
    if row.get("_images"):
        raise UserError(
            f"Row {row['_source']} has images, to whose question an environment adds no text."
        )
    prompt = row["prompt"]
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=None)
    if last is None:
        raise UserError(f"Row {row['_source']} has no user message for the environment's text.")
    message = {**prompt[last], "content": prompt[last]["content"] + observation}
    prompt = [*prompt[:last], message, *prompt[last + 1 :]]
    (row,), _ = tokenize_rows(
        [{**row, "prompt": prompt}], tokenizer, config, need_hint=need_hint, toolbox=toolbox
    )
    return row


def _take_turn(lines, open_, sample, model, tokenizer, rows, config, greedy):
    """One more turn of the model on the lines that are open."""
    room = [config.max_completion_length - len(lines[i].ids) for i in open_]
    limited = copy.copy(config)
    limited.max_completion_length = max(room)
    drawn = sample(
        model, tokenizer, [rows[i]["prompt_ids"] + lines[i].ids for i in open_], limited,
        greedy=greedy, images=[rows[i].get("_images") for i in open_],
    )
    drawn = Samples(*(x if x is None else x.cpu() for x in drawn))
    for k, (i, left) in enumerate(zip(open_, room, strict=True)):
        keep = drawn.mask[k]
        ids = drawn.completion_ids[k][keep][:left].tolist()
        log_probs = [0.0] * len(ids)
        if drawn.log_probs is not None:
            log_probs = drawn.log_probs[k][keep][:left].tolist()
        lines[i].add(ids, log_probs, True)
        lines[i].texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        lines[i].truncated = bool(drawn.truncated[k]) or keep.sum().item() > left


def _read(line, row, tokenizer):
    """The assistant's message of the last turn; calls that cannot be read are one unknown call."""
    start = len(line.ids) - next(
        (k for k, mine in enumerate(reversed(line.tool_mask)) if not mine), len(line.ids)
    )
    ids, text = line.ids[start:], line.texts[-1]
    plain = {"role": "assistant", "content": text}
    try:
        found = tokenizer.parse_response(  # by their schemas "7" is a number, where one is wanted
            ids, prefix=row["prompt_ids"] + line.ids[:start],
            tools=(row.get("_template_options") or {}).get("tools"),
        )
    except Exception:  # the parsers of json and of each template raise what they like
        broken = {"type": "function", "function": {"name": UNKNOWN, "arguments": None}}
        return {**plain, "tool_calls": [broken]}
    calls = found.get("tool_calls") if isinstance(found, dict) else None
    if not calls:
        return plain
    message = {**plain, "content": found.get("content") or "", "tool_calls": calls}
    return message if isinstance(calls, list) else {**message, "tool_calls": [calls]}


def _answer(line, calls, episode, row, toolbox, tokenizer, config):
    """Let tools answer; False where the answers find no room, so that the line ends before them."""
    answers = []
    for call in calls:
        message, failed = toolbox.answer(episode, call, tokenizer)
        answers.append(message)
        line.calls += 1
        line.failures += failed
    ids = answer_ids(answers, tokenizer, row.get("_template_options"))
    if len(line.ids) + len(ids) >= config.max_completion_length:
        line.truncated = True
        return False
    line.messages += answers
    line.add(ids, [0.0] * len(ids), False)
    return True


def answer_ids(answers, tokenizer, options=None):
    """Ids of what the chat template writes between two turns of the assistant: tool messages, and
    the start of the next."""
    call = {"type": "function", "function": {**PROBE, "name": answers[0]["name"]}}
    before = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = apply_template(tokenizer, before + answers, options, add_generation_prompt=True)
    end, _ = end_of_turn(tokenizer)
    start = text.index(end, text.index(PROBE["arguments"]["probe_key"])) + len(end)
    return tokenizer(text[start:], add_special_tokens=False)["input_ids"]


def _tensors(lines, pad_id, device, greedy):
    """(Samples, (B, T) tool_mask) of lines."""
    width = max(len(line.ids) for line in lines)
    ids = torch.full((len(lines), width), pad_id, dtype=torch.int64)
    mask, by_model = (torch.zeros((len(lines), width), dtype=torch.bool) for _ in range(2))
    log_probs = torch.zeros((len(lines), width))
    for i, line in enumerate(lines):
        n = len(line.ids)
        ids[i, :n], mask[i, :n] = torch.tensor(line.ids), True
        by_model[i, :n], log_probs[i, :n] = (
            torch.tensor(line.tool_mask), torch.tensor(line.log_probs)
        )
    truncated = torch.tensor([line.truncated for line in lines])
    samples = (ids, mask, truncated, None if greedy else log_probs)
    return Samples(*(x if x is None else x.to(device) for x in samples)), by_model.to(device)


def played_by_function(function, trainer, model, tokenizer, rows):
    """Played: by the user's rollout_func(prompts, trainer), which returns a mapping of lists.

    prompt_ids, completion_ids; logprobs, env_mask (1 where the model wrote) and further columns for
    the reward functions are optional. Its prompts must be the rows', or teacher_prompt_ids given.
    """
    try:
        found = function([copy.deepcopy(row["prompt"]) for row in rows], trainer)
    except (Exception, SystemExit) as error:
        raise told("rollout_func", error) from error
    if not isinstance(found, dict) or not {"prompt_ids", "completion_ids"} <= found.keys():
        got = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise UserError(
            "rollout_func must return a mapping with prompt_ids and completion_ids, but returned "
            f"{got}."
        )
    for name, values in found.items():
        if not isinstance(values, list) or len(values) != len(rows):
            raise UserError(
                f"rollout_func must return lists of {len(rows)} values, one per prompt, but "
                f"{name} is not."
            )
    size, ends = len(model.get_output_embeddings().weight), eos_ids(model, tokenizer)
    returned = [{name: values[i] for name, values in found.items()} for i in range(len(rows))]
    lines, new = [], []
    for row, own in zip(rows, returned, strict=True):
        try:
            prompt, teacher, line = _line_of(own)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"rollout_func returned for row {row['_source']} what are no lists of numbers "
                f"({error})."
            ) from None
        if any(not 0 <= t < size for t in prompt + line.ids) or not prompt or not line.ids:
            raise UserError(
                f"rollout_func returned an empty list or an id outside of the model's {size} for "
                f"row {row['_source']}."
            )
        if len({*map(len, (line.ids, line.tool_mask, line.log_probs))}) > 1:
            raise UserError(
                f"rollout_func returned {len(line.ids)} completion_ids for row {row['_source']}, "
                f"but {len(line.tool_mask)} values of env_mask and {len(line.log_probs)} logprobs."
            )
        line.texts.append(tokenizer.decode(
            [t for t, mine in zip(line.ids, line.tool_mask, strict=True) if mine],
            skip_special_tokens=True,
        ))
        line.truncated = line.ids[-1] not in ends
        lines.append(line)
        if "teacher_prompt_ids" in own:
            row = {**row, "teacher_prompt_ids": teacher}
        elif row["teacher_prompt_ids"] and prompt != row["prompt_ids"]:
            raise UserError(
                f"rollout_func used another prompt for row {row['_source']} than the row's, so "
                "that the teacher's would not follow it; return teacher_prompt_ids too."
            )
        new.append({**row, "prompt_ids": prompt})
    device = model.get_input_embeddings().weight.device
    texts = [line.texts[0] for line in lines]
    return Played(
        new, *_tensors(lines, tokenizer.pad_token_id, device, greedy=False), texts, texts, None,
        found.get("feedback"),
        [{k: v for k, v in x.items() if k not in OF_ROLLOUT} for x in returned],
    )


def _line_of(own):
    """(prompt ids, the teacher's or None, _Line) of what rollout_func returned for one row."""
    prompt, ids, teacher = (
        [int(t) for t in own.get(name) or ()]
        for name in ("prompt_ids", "completion_ids", "teacher_prompt_ids")
    )
    line = _Line()
    line.ids = ids
    line.tool_mask = [bool(m) for m in own.get("env_mask", [1] * len(ids))]
    line.log_probs = [  # TRL's may be lists, the drawn token's first
        float(p[0] if isinstance(p, list | tuple) else p)
        for p in own.get("logprobs", [math.nan] * len(ids))
    ]
    return prompt, teacher or None, line
