"""Datasets as lists of rows: jsonl, parquet, hub ids and reasoning-gym tasks, one set of columns.

Columns: `prompt` (text or chat messages) and `solution`; optional `privileged_context` (default:
`solution`), `teacher_prompt` and `images`. GSM8K's question/answer and verl's parquet are
recognised. Every row knows where it came from, so that a complaint can name it.
"""

import json
import os

from .config import UserError
from .images import PromptImages
from .prompts import encode_pair, is_chat

SOURCE = "_source"
# Tasks of reasoning-gym 0.1.25 whose scorers do not give their own stored answers full marks.
UNUSABLE_TASKS = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")


def load_rows(spec, *, size=1000, seed=0):
    """The rows of a dataset, with uniform columns; size and seed matter to reasoning-gym only."""
    if spec.startswith("reasoning-gym:"):
        return _reasoning_gym(spec.removeprefix("reasoning-gym:"), size, seed)
    if spec.endswith(".jsonl"):
        raw = _read_jsonl(spec)
    elif spec.endswith(".parquet"):
        raw = _read_parquet(spec)
    elif os.path.exists(spec) or spec.endswith((".json", ".csv", ".txt", ".yaml")):
        raise UserError(f"The dataset {spec} is neither .jsonl nor .parquet; convert it to one.")
    else:
        raw = _read_hub(spec)
    if not raw:
        raise UserError(f"The dataset {spec} has no rows.")
    return [_uniform(row, source) for source, row in raw]


def _read_jsonl(path):
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                source = f"line {number} of {path}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"Row {source} is not valid JSON: {error.msg} at column {error.colno}."
                    ) from None
                if not isinstance(row, dict):
                    raise UserError(f"Row {source} must be a JSON object with named columns.")
                rows.append((source, row))
    except OSError as error:
        raise UserError(f"Cannot read the dataset {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The dataset {path} is not UTF-8 text.") from None
    return rows


def _read_parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"Reading {path} needs pyarrow: pip install '.[data]'.") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except OSError as error:
        raise UserError(f"Cannot read the dataset {path}: {error}.") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"The dataset {path} is not a readable parquet file: {error}.") from None
    return [(f"{i} of {path}", row) for i, row in enumerate(table.to_pylist())]


def _read_hub(spec):
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"There is no file {spec}, and reading it as a hub dataset needs the datasets "
            "package: pip install '.[data]'."
        ) from None
    try:
        name, _, config = spec.partition(":")
        table = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": .")
        raise UserError(
            f"{spec} is neither a file nor a hub dataset that can be loaded here ({reason})."
        ) from None
    return [(f"{i} of {spec}", row) for i, row in enumerate(table)]


def _uniform(row, source):
    """Rename the columns of GSM8K and verl; a missing prompt or solution names the row."""
    row = dict(row)
    if "prompt" not in row and isinstance(row.get("question"), str) and "answer" in row:
        answer = "" if row["answer"] is None else str(row["answer"])
        row["prompt"], row["_as_chat"] = row.pop("question"), True
        row["solution"] = answer.rpartition("####")[2].strip()
        row.setdefault("privileged_context", answer)
    reward_model, extra = row.get("reward_model"), row.get("extra_info")
    if isinstance(reward_model, dict) and "ground_truth" in reward_model:
        row.setdefault("solution", reward_model["ground_truth"])
        if isinstance(extra, dict) and extra.get("answer"):
            row.setdefault("privileged_context", extra["answer"])
    for column in ("prompt", "solution"):
        if row.get(column) in (None, "", []):
            raise UserError(f"Row {source} has no {column}.")
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise UserError(
            f"Row {source}: prompt must be a text or a list of messages with role and text "
            f"content, but is {prompt!r:.80}."
        )
    row["solution"] = str(row["solution"])
    row.setdefault("privileged_context", row["solution"])
    if row["privileged_context"] is None:  # a column with a gap is not a missing column
        row["privileged_context"] = ""
    if not isinstance(row["privileged_context"], str):
        raise UserError(f"Row {source}: privileged_context must be a text.")
    row[SOURCE] = source
    return row


def _reasoning_gym(tasks, size, seed):
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "reasoning-gym: datasets need the reasoning-gym package: pip install '.[data]'."
        ) from None
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("reasoning-gym: needs a task name, as in reasoning-gym:chain_sum.")
    rows = []
    for k, name in enumerate(names):
        if name in UNUSABLE_TASKS:
            raise UserError(
                f"The reasoning-gym task {name} does not give its own stored answers full marks, "
                "so they cannot serve as privileged context; choose another task."
            )
        count = size // len(names) + (k < size % len(names))
        try:
            entries = reasoning_gym.create_dataset(name, size=max(1, count), seed=seed)
        except ValueError as error:
            raise UserError(f"reasoning-gym cannot make the task {name!r}: {error}.") from None
        for i in range(count):
            entry = entries[i]
            rows.append((i, {
                "prompt": entry["question"], "solution": entry["answer"], "task": name,
                "privileged_context": entry["answer"], "entry": entry, "_as_chat": True,
                SOURCE: f"{i} of reasoning-gym:{name}",
            }))
    # Tasks alternate, so that a held-out tail has all of them.
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def shuffle_hints(rows):
    """Control: every row gets the next row's privileged context (a cycle: none keeps its own)."""
    if len(rows) < 2:
        raise UserError("shuffle_privileged_context needs at least two rows to swap hints between.")
    hints = [row["privileged_context"] for row in rows]
    return [
        {**row, "privileged_context": hint, "teacher_prompt": None}
        for row, hint in zip(rows, [*hints[1:], hints[0]], strict=True)
    ]


def tokenize_rows(rows, tokenizer, config, *, need_hint, processor=None):
    """Add prompt_ids and teacher_prompt_ids; returns the kept rows and a sentence on dropped ones.

    A row without privileged context is an error naming the row unless the config allows it.
    """
    kept, dropped = [], []
    for row in rows:
        source = row[SOURCE]
        with_images = bool(row.get("images") or row.get("image"))
        if with_images and processor is None:
            raise UserError(f"Row {source} has images, but the model takes none.")
        chat = with_images or row.get("_as_chat") and tokenizer.chat_template
        if chat and isinstance(row["prompt"], str):
            row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
        hint = row.get("teacher_prompt") or row["privileged_context"].strip()
        if need_hint and not hint and not config.allow_missing_privileged_context:
            raise UserError(
                f"Row {source} has no privileged context, so it would silently train as plain "
                "GRPO; fill privileged_context or set allow_missing_privileged_context."
            )
        try:
            if with_images:
                row = {**row, "_images": PromptImages(row, processor)}
            read = row if need_hint else {k: row[k] for k in ("prompt", "_images") if k in row}
            student, teacher = encode_pair(read, tokenizer, config.privileged_template)
        except UserError as error:
            raise UserError(f"Row {source} cannot be used: {error}.") from None
        for name, ids, limit in (
            ("prompt", student, config.max_prompt_length),
            ("privileged prompt", teacher, config.max_teacher_prompt_length),
        ):
            if ids is not None and limit is not None and len(ids) > limit:
                dropped.append(f"row {source} with a {name} of {len(ids)} tokens, limit {limit}")
                break
        else:
            kept.append({
                **row, "prompt_ids": student, "teacher_prompt_ids": teacher if hint else None,
            })
    note = ""
    if dropped:
        note = f"Dropped {len(dropped)} of {len(rows)} rows as over-long; first: {dropped[0]}."
    if not kept:
        raise UserError(f"No row is left to use: {note}")
    return kept, note


def load_data(config, tokenizer, log=print, processor=None):
    """(training rows, held-out rows), tokenised; no held-out question occurs in training."""
    need_hint = config.objective == "rlsd" and config.rlsd_lambda > 0
    rows = load_rows(config.train_dataset, size=config.dataset_size, seed=config.seed)
    held_out = []
    if config.eval_dataset:
        # Entry i of a reasoning-gym dataset is seeded with seed + i: start past the training rows.
        seed = config.seed + config.dataset_size
        held_out = load_rows(config.eval_dataset, size=config.eval_size, seed=seed)
        held_out = held_out[: config.eval_size]
    elif config.eval_size:
        if len(rows) <= config.eval_size:
            raise UserError(
                f"{config.train_dataset} has {len(rows)} rows, too few to hold out eval_size = "
                f"{config.eval_size}; lower eval_size or name an eval_dataset."
            )
        rows, held_out = rows[: -config.eval_size], rows[-config.eval_size :]
    seen = {str(row["prompt"]) for row in rows}
    fresh = [row for row in held_out if str(row["prompt"]) not in seen]
    if len(fresh) < len(held_out):
        log(f"Left out {len(held_out) - len(fresh)} held-out questions that occur in training.")
    if held_out and not fresh:
        raise UserError("Every held-out question also occurs in training; name an eval_dataset.")
    if config.shuffle_privileged_context:
        rows = shuffle_hints(rows)
    rows, note = tokenize_rows(
        rows, tokenizer, config, need_hint=need_hint, processor=processor
    )
    if note:
        log(note)
    if fresh:
        fresh, note = tokenize_rows(
            fresh, tokenizer, config, need_hint=False, processor=processor
        )
        if note:
            log(f"Held-out: {note}")
    return rows, fresh
