"""Datasets as lists of rows: jsonl, parquet, hub ids, generated tasks, one set of columns.

Columns: `prompt` (text or chat messages) and `solution` (or `tests`); optional
`privileged_context` (default: `solution`), `teacher_prompt` and `images`. GSM8K's question/answer,
MATH's problem/solution, verl's parquet, MBPP and HumanEval are recognised. Every row knows where it
came from, so that a complaint can name it.
"""

import json
import os
import random
import re

import torch

from ..config import UserError
from ..packages import package
from .answers import as_text, last_boxed
from .images import PromptImages, listed, picture_of
from .prompts import (
    encode_pair,
    is_chat,
    require_plain,
    require_template_options,
    template_options,
)
from .worked import worked_rows

SOURCE = "_source"
GENERATED = " of reasoning-gym:"  # in the source of rows that reasoning-gym made
# What the trainer keeps in a row, and reward functions never see.
INTERNAL = {SOURCE, "_as_chat", "_images", "_reference_ids", "_opening", "_around_sibling",
            "prompt_ids", "teacher_prompt_ids"}
# A column of such a name would take the place of what reward functions are given.
RESERVED = {"prompts", "completions", "completion_ids"} | INTERNAL
# Tasks of reasoning-gym 0.1.25 whose scorers do not give their own stored answers full marks.
UNUSABLE_TASKS = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")


def load_rows(spec, *, size=1000, seed=0):
    """The rows of a dataset, with uniform columns; size and seed matter to generated ones only."""
    if spec.startswith("reasoning-gym:"):
        return _reasoning_gym(spec.removeprefix("reasoning-gym:"), size, seed)
    if spec.startswith("worked:"):
        return worked_rows(spec.removeprefix("worked:"), size, seed)
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
                except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
                    raise UserError(
                        f"Row {source} cannot be read: {str(error).partition(';')[0]}; write such "
                        "a value as a text."
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
        raise UserError(f"Reading {path} needs {package('pyarrow')}.") from None
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
            f"There is no file {spec}, and reading it as a hub dataset needs "
            f"{package('datasets')}."
        ) from None
    try:
        name, _, split = spec.partition("@")
        name, _, config = name.partition(":")
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": .")
        raise UserError(
            f"{spec} is neither a file nor a hub dataset that can be loaded here ({reason})."
        ) from None
    return [(f"{i} of {spec}", row) for i, row in enumerate(table)]


def _require_clean(row, source):
    """UserError for a column that would hide another value, or a text that is no Unicode."""
    taken = sorted(RESERVED & row.keys())
    if taken:
        raise UserError(
            f"Row {source} has a column {taken[0]}, a name that the trainer needs for what it "
            "gives to reward functions; rename the column."
        )
    try:
        json.dumps(row, ensure_ascii=False, default=lambda value: None).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"Row {source} has a text with half of a surrogate pair "
            f"({ascii(error.object[error.start])}), which no tokenizer reads; repair or drop it."
        ) from None
    except (TypeError, ValueError, RecursionError):
        pass  # a key or value that is no JSON comes from Arrow, whose texts are Unicode


def _uniform(row, source):
    """Rename the columns of known datasets; a missing prompt or solution names the row."""
    row = dict(row)
    _require_clean(row, source)
    try:
        _rename_code(row)
        if row.get("tests") is not None:
            row["tests"] = read_tests(row["tests"])
            if not row["tests"].get("asserts", "cases").strip():  # any program would pass
                row["tests"] = None
    except UserError as error:
        raise UserError(f"Row {source} cannot be used: {error}.") from None
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"Row {source} cannot be used: its tests have none of the known forms "
            f"({type(error).__name__}: {error})."
        ) from None
    if "prompt" not in row and isinstance(row.get("question"), str) and "answer" in row:
        answer, worked = as_text(row["answer"]) or "", row.get("solution")
        row["prompt"], row["_as_chat"] = row.pop("question"), True
        row["solution"] = answer.rpartition("####")[2].strip()
        if "####" in answer or not (isinstance(worked, str) and worked.strip()):
            worked = answer
        row.setdefault("privileged_context", worked)
    if "prompt" not in row and isinstance(row.get("problem"), str):
        row["prompt"], row["_as_chat"] = row.pop("problem"), True
        _rename_math(row)
    reward_model, extra = row.get("reward_model"), row.get("extra_info")
    if isinstance(reward_model, dict) and "ground_truth" in reward_model:
        if not row.get("tests"):
            row.setdefault("solution", _one_answer(reward_model["ground_truth"], source))
        if isinstance(extra, dict) and extra.get("answer"):
            row.setdefault("privileged_context", as_text(extra["answer"]))
    row["solution"] = as_text(row.get("solution")) or ""
    for column in ("prompt", "solution"):
        if row.get(column) in (None, "", []) and not (column == "solution" and row.get("tests")):
            raise UserError(f"Row {source} has no {column}.")
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise UserError(
            f"Row {source}: prompt must be a text or a list of messages with role and text "
            f"content, but is {prompt!r:.80}."
        )
    row.setdefault("privileged_context", row["solution"])
    if row["privileged_context"] is None:  # a column with a gap is not a missing column
        row["privileged_context"] = ""
    if not isinstance(row["privileged_context"], str):
        raise UserError(f"Row {source}: privileged_context must be a text.")
    row[SOURCE] = source
    return row


def _rename_math(row):
    """MATH's `solution` is worked, and its `answer` what it ends with, or else the last box."""
    worked, answer = row.get("solution"), row.get("answer")
    if answer in (None, "") and isinstance(worked, str):
        answer = last_boxed(worked) or worked
    row["solution"] = answer
    if worked:
        row.setdefault("privileged_context", worked)


def _one_answer(answer, source):
    """verl's ground_truth; some sets wrap it in a list."""
    if isinstance(answer, list | tuple) and len(answer) == 1:
        return answer[0]
    if isinstance(answer, list | tuple | dict):
        raise UserError(
            f"Row {source}: reward_model.ground_truth must be one answer or the tests of a program "
            f"(inputs and outputs, or assertions), but is {answer!r:.80}."
        )
    return answer


def _rename_code(row):
    """Fill `tests` and `solution` from the columns of MBPP, HumanEval, open-r1 and verl's code."""
    if row.get("tests") is not None:
        return
    reward_model = row.get("reward_model")
    if isinstance(row.get("test_list"), list):
        setup = row.get("test_setup_code") or row.get("test_imports") or ""
        setup = "\n".join(setup) if isinstance(setup, list) else setup
        for assertion in (setup, *row["test_list"]):
            if not isinstance(assertion, str):
                raise UserError(f"its test_list must hold assertions, but holds {assertion!r:.80}")
        row["tests"] = "\n".join([setup, *row["test_list"]])
        task = row.pop("text", None) or row.get("prompt")
        if not task:
            raise UserError("it has a test_list, but no text or prompt that says the task")
        shown = "\n".join(row["test_list"])
        row["prompt"] = f"{task}\nYour code should pass these tests:\n{shown}"
        row["_as_chat"] = True
        row.setdefault("solution", row.pop("code", None))
    elif isinstance(row.get("test"), str) and isinstance(row.get("entry_point"), str):
        row["tests"] = {
            "asserts": f"{row.pop('test')}\ncheck({row['entry_point']})",
            "prefix": row.get("prompt"), "entry_point": row["entry_point"],
        }
        row.setdefault("solution", row.pop("canonical_solution", None))
    elif isinstance(row.get("verification_info"), str | dict):
        row["tests"] = row.pop("verification_info")
    elif isinstance(reward_model, dict) and _is_tests(reward_model.get("ground_truth")):
        row["tests"] = reward_model["ground_truth"]


def _is_tests(answer):
    """Whether a ground truth is the tests of a program rather than an answer."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError):
            return False
    if isinstance(answer, list):
        return bool(answer) and all(isinstance(a, dict) and "input" in a for a in answer)
    return isinstance(answer, dict) and bool(answer.keys() & TEST_KEYS)


TEST_KEYS = {"inputs", "asserts", "assert_case", "test_cases", "functional"}


def read_tests(tests):
    """Tests of a program, from the forms that RLVR datasets have, in one of two.

    {"asserts": Python source}, with HumanEval's "prefix" and "entry_point" where given; or
    {"cases": [[input, output], ...], "fn_name": name or None}: with a name, input is the list of
    its arguments and output what it returns; without, both are the text of a standard stream.

    tests: {"inputs": [...], "outputs": [...], "fn_name": ...} (APPS, PRIME), a list of
    {"input", "output"} or {"test_cases": that list} (LiveCodeBench, open-r1), a list of assertions
    (MBPP), {"assert_case": that list} or {"functional": source} (verl), any of them as JSON, or
    Python source. Raises UserError, a clause that the caller completes with the row's name.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError:
            return {"asserts": tests}
        except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
            raise UserError(f"its tests cannot be read: {str(error).partition(';')[0]}") from None
    if isinstance(tests, dict) and isinstance(tests.get("cases"), list):
        if not all(isinstance(case, list | tuple) and len(case) == 2 for case in tests["cases"]):
            raise UserError("its tests have cases that are no pairs of input and output")
        return {**tests, **_cases(tests["cases"], tests.get("fn_name"))}
    if isinstance(tests, dict):
        tests = {name: value for name, value in tests.items() if value is not None}
        if isinstance(tests.get("asserts"), str):
            return tests
        for name in ("assert_case", "asserts", "test_cases", "functional"):
            if name in tests:
                return read_tests(tests[name])
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if isinstance(inputs, list) and isinstance(outputs, list):
            if not inputs or len(inputs) != len(outputs):
                raise UserError(f"its tests have {len(inputs)} inputs and {len(outputs)} outputs")
            return _cases(zip(inputs, outputs, strict=True), tests.get("fn_name"))
    if isinstance(tests, list) and tests and all(isinstance(t, str) for t in tests):
        return {"asserts": "\n".join(tests)}
    if isinstance(tests, list) and tests and all(
        isinstance(t, dict) and t.get("input") is not None and t.get("output") is not None
        for t in tests
    ):
        names = {t.get("fn_name") or (t.get("metadata") or {}).get("func_name") for t in tests}
        if len(names) > 1:
            raise UserError("its tests call several functions")
        return _cases([(t["input"], t["output"]) for t in tests], names.pop())
    raise UserError(
        f"its tests must be assertions, or inputs and outputs of the same number, but are "
        f"{tests!r:.80}"
    )


def _cases(pairs, fn_name):
    """Cases of read_tests; texts of a function's arguments hold one JSON value per line."""
    cases = []
    if fn_name is not None and not isinstance(fn_name, str):
        raise UserError(f"its fn_name must be the name of a function, but is {fn_name!r:.80}")
    for given, wanted in pairs:
        try:
            if fn_name and isinstance(given, str):
                given = [json.loads(line) for line in given.splitlines() if line.strip()]
                wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
        except (ValueError, RecursionError):
            raise UserError(f"a test of {fn_name} is not JSON: {given!r:.80}") from None
        if fn_name and not isinstance(given, list):
            raise UserError(
                f"a test of {fn_name} must list its arguments, but its input is {given!r:.80}"
            )
        if not fn_name:
            given, wanted = (
                "\n".join(map(str, text)) if isinstance(text, list) else str(text)
                for text in (given, wanted)
            )
        cases.append([given, wanted])
    return {"cases": cases, "fn_name": fn_name}


def _reasoning_gym(tasks, size, seed):
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            f"A reasoning-gym: dataset needs {package('reasoning_gym')}."
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
                SOURCE: f"{i}{GENERATED}{name}",
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


def answers_as_hints(rows):
    """Control: the hint of every row is its solution, usually the bare answer."""
    return [
        {**row, "privileged_context": row["solution"], "teacher_prompt": None} for row in rows
    ]


def tokenize_rows(
    rows, tokenizer, config, *, need_hint, need_reference=False, processor=None, toolbox=None
):
    """Add prompt_ids and teacher_prompt_ids; returns the kept rows and a sentence on dropped ones.

    A row without privileged context is an error naming the row unless the config allows it.
    need_reference: add _reference_ids too, the privileged context as a completion with EOS.
    toolbox: a tools.Toolbox, whose tools the chat template then shows.
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
        if need_hint and row.get("teacher_prompt") and config.rlsd_contrast_hints:
            raise UserError(
                f"Row {source} has a teacher_prompt, in which no wrong solution can stand instead, "
                "as a contrast needs; give it as privileged_context, or set hint_source to rollout."
            )
        if need_hint and not hint and not config.allow_missing_privileged_context:
            raise UserError(
                f"Row {source} has no privileged context, so it would silently train as plain "
                "GRPO; fill privileged_context or set allow_missing_privileged_context."
            )
        if need_reference and not row["privileged_context"].strip():
            raise UserError(
                f"Row {source} has no reference solution, which objective {config.objective} "
                "trains on; fill privileged_context or solution."
            )
        try:
            options = template_options(row, config)
            if toolbox is not None:
                if isinstance(row["prompt"], str):
                    raise UserError("it is a plain text, but tools need a prompt of chat messages")
                options = options | toolbox.template_options(row)
            row = {**row, "_template_options": options}
            if with_images:
                row["_images"] = PromptImages(row, processor)
            asked = ("prompt", "_images", "_template_options")
            read = row if need_hint else {k: row[k] for k in asked if k in row}
            how = config.privileged_template, config.hint_placement
            student, teacher = encode_pair(read, tokenizer, *how)
            around = student
            # Their template must find its place, and room.
            if config.reads_siblings() or config.hint_func:
                trial = {**row, "privileged_context": "0", "teacher_prompt": None}
                _, around = encode_pair(trial, tokenizer, *how)
            if need_reference:
                require_plain({"privileged_context": row["privileged_context"]}, tokenizer)
        except UserError as error:
            raise UserError(f"Row {source} cannot be used: {error}.") from None
        reference = None
        if need_reference:
            reference = tokenizer(row["privileged_context"], add_special_tokens=False)["input_ids"]
            reference = [*reference, tokenizer.eos_token_id]
        for name, ids, limit in (
            ("prompt", student, config.max_prompt_length),
            ("privileged prompt", teacher, config.max_teacher_prompt_length),
            ("reference solution", reference, config.max_completion_length),
        ):
            if ids is not None and limit is not None and len(ids) > limit:
                dropped.append(f"row {source} with a {name} of {len(ids)} tokens, limit {limit}")
                break
        else:
            kept.append({
                **row, "prompt_ids": student, "teacher_prompt_ids": teacher if hint else None,
                "_reference_ids": reference, "_opening": _opening(student, tokenizer),
                "_around_sibling": len(around),
            })
    note = ""
    if dropped:
        note = f"Dropped {len(dropped)} of {len(rows)} rows as over-long; first: {dropped[0]}."
    if not kept:
        raise UserError(f"No row is left to use: {note}")
    return kept, note


def _opening(prompt_ids, tokenizer):
    """What the end of a prompt, such as a template's, has written of the thoughts; or ""."""
    end = tokenizer.decode(prompt_ids[-32:])
    found = re.search(r"<think>\s*(?:</think>\s*)?$", end)
    return found[0] if found else ""


def question(row, hidden=False):
    """What makes two rows the same question: the text of the prompt, or of its user turns, and
    the images.

    hidden: with all other columns, of which an environment may make another episode.
    """
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(m["content"] for m in prompt if m["role"] == "user")
    text = " ".join([*prompt.split(), *map(str, filter(None, map(picture_of, listed(row))))])
    if hidden:
        text += repr(sorted((k, v) for k, v in row.items() if k[:1] != "_"))
    return text


def split_rows(rows, config):
    """(training, held-out) rows of train_dataset; both have none in common, repeats included.

    Without eval_split_size the last eval_size rows are held out. With it, whole questions (all
    rows that repeat one) are drawn by the seed until that many rows, or that share, are reached.
    """
    if config.eval_dataset:
        return rows, []
    if config.eval_split_size is None:
        count = config.eval_size
    else:
        share = config.eval_split_size
        count = max(1, round(share * len(rows))) if share < 1 else int(share)
    if count and len(rows) <= count:
        option = "eval_size" if config.eval_split_size is None else "eval_split_size"
        raise UserError(
            f"{config.train_dataset} has {len(rows)} rows, too few to hold out {option} = "
            f"{count}; lower {option} or name an eval_dataset."
        )
    if config.eval_split_size is None:
        return rows[: len(rows) - count], rows[len(rows) - count :]
    groups, hidden = {}, bool(config.environment_factory)
    for i, row in enumerate(rows):
        groups.setdefault(question(row, hidden), []).append(i)
    order, chosen = list(groups), set()
    random.Random(config.data_seed()).shuffle(order)
    for name in order:
        if len(chosen) + len(groups[name]) <= count:
            chosen.update(groups[name])
    if not chosen:
        raise UserError(
            f"{config.train_dataset} cannot hold out eval_split_size = {count} rows, as more than "
            "that ask the same question; raise it or name an eval_dataset."
        )
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [rows[i] for i in sorted(chosen)]


def split_data(config):
    """(training rows, held-out rows) as they were read; an evaluation may have no training rows."""
    rows = []
    if config.train_dataset:
        rows = load_rows(config.train_dataset, size=config.dataset_size, seed=config.data_seed())
    rows, held_out = split_rows(rows, config)
    if config.eval_dataset:
        # Entry i of a reasoning-gym dataset is seeded with seed + i: start past the training rows.
        seed = config.data_seed() + config.dataset_size
        held_out = load_rows(config.eval_dataset, size=config.eval_size, seed=seed)
        held_out = held_out[: config.eval_size]
    return rows, held_out


def load_data(config, tokenizer, log=print, processor=None, toolbox=None, trained=frozenset()):
    """(training rows, held-out rows), tokenised; no held-out question occurs in training.

    An evaluation may name an eval_dataset alone; there are no training rows then. toolbox: of
    tools.load_tools. trained: more questions (see question) that were trained on.
    """
    need_reference = config.method.supervised
    if need_reference and tokenizer.eos_token_id is None:
        raise UserError("The tokenizer names no EOS token, so no reference solution can end.")
    require_template_options(config.chat_template_kwargs, tokenizer, processor)
    hidden = bool(config.environment_factory)
    rows, held_out = split_data(config)
    seen = {question(row, hidden) for row in rows}
    if config.eval_split_size is not None:
        count = len(rows) + len(held_out)
        repeated = count - len(seen | {question(row, hidden) for row in held_out})
        if repeated:
            log(f"{repeated} of {count} rows repeat another's question; repeats stay on one side "
                "of the split.")
    seen |= trained
    fresh = [row for row in held_out if question(row, hidden) not in seen]
    if len(fresh) < len(held_out):
        log(f"Left out {len(held_out) - len(fresh)} held-out questions that occur in training.")
    if held_out and not fresh:
        raise UserError("Every held-out question also occurs in training; name an eval_dataset.")
    if rows:
        if config.shuffle_privileged_context:
            rows = shuffle_hints(rows)
        if config.answer_only_privileged_context:
            rows = answers_as_hints(rows)
        rows, note = tokenize_rows(
            rows, tokenizer, config, need_hint=config.reads_hints(), need_reference=need_reference,
            processor=processor, toolbox=toolbox,
        )
        if note:
            log(note)
    if fresh:
        fresh, note = tokenize_rows(
            fresh, tokenizer, config, need_hint=False, processor=processor, toolbox=toolbox
        )
        if note:
            log(f"Held-out: {note}")
    return rows, fresh


def rows_of_step(rows, count, step, seed):
    """`count` rows for a 1-based step: a function of seed and step, reshuffled per epoch."""
    picked, orders = [], {}
    for i in range((step - 1) * count, step * count):
        epoch, k = divmod(i, len(rows))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(rows), generator=generator).tolist()
        picked.append(rows[orders[epoch][k]])
    return picked
