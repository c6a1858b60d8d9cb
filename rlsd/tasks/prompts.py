"""Student and privileged prompts: the same text but for one insertion, as token ids.

The privileged prompt is the student's with `privileged_template` around the last user turn (or
around a plain-text prompt), or with one more exchange before that turn: the same question, solved
by the hint. So nothing but the hint differs and the response starts at the same boundary. With an
empty hint both are identical, and delta is 0 under equal weights. Control tokens come from chat
templates and from texts that are the whole prompt, never from a message or a hint.
"""

import functools
import re

from ..config import UserError
from .images import apply_template

HINT_ARGUMENTS = ("prompt", "completion", "feedback")  # of hint_func; no column takes their place


@functools.lru_cache(maxsize=8)
def _control_pattern(tokenizer):
    """Matches the longest control token, as the tokenizer reads it out of any text."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = {*map(str, added), *tokenizer.all_special_tokens} - {"", tokenizer.unk_token}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def control_token(text, tokenizer):
    """The first control token that a text spells, or None; the unknown token is none."""
    found = _control_pattern(tokenizer).search(text)
    return found and found[0]


def insert_hint(prompt, hint, template, bos_token=None, placement="text"):
    """The prompt (text or chat messages) with the hint inserted; unchanged when it is empty.

    A text's own bos_token stays at its start. placement: hint_placement of the config.
    """
    if not hint:
        return prompt
    if isinstance(prompt, str) and placement == "turn":
        raise UserError(
            "its prompt is a plain text, in which hint_placement turn finds no turns; give it as "
            "chat messages, or set hint_placement to text"
        )
    if isinstance(prompt, str):
        start = bos_token if bos_token and prompt.startswith(bos_token) else ""
        values = {"prompt": prompt[len(start) :], "privileged_context": hint}
        return start + re.sub(r"\{(prompt|privileged_context)\}", lambda m: values[m[1]], template)
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=None)
    if last is None:
        raise UserError("its chat has no user message that could carry the privileged context")
    message = prompt[last]
    if placement == "turn":
        return [
            *prompt[:last], message, {"role": "assistant", "content": hint}, *prompt[last:]
        ]
    content = insert_hint(message["content"], hint, template)
    return [*prompt[:last], {**message, "content": content}, *prompt[last + 1 :]]


def is_chat(prompt):
    """Whether it is a list of messages with a role and text content."""
    return isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
        for m in prompt
    )


def render(prompt, tokenizer, template_options=None):
    """(text, assistant boundary): the prompt as the model sees it and how it must end.

    template_options: dict, further arguments of the chat template, as enable_thinking.
    """
    if isinstance(prompt, str):
        return prompt, ""
    if tokenizer.chat_template is None:
        raise UserError("it is a chat, but the tokenizer has no chat template; use a plain text")
    full, without = (
        apply_template(tokenizer, prompt, template_options, add_generation_prompt=turn)
        for turn in (True, False)
    )
    return full, full[len(without) :] if full.startswith(without) else ""


OURS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message",
        "return_dict", "return_tensors")  # arguments of apply_chat_template


def template_options(row, config):
    """Arguments of the chat template for a row: the config's, then those of its own column.

    Raises UserError, a clause that the caller completes with the row's name.
    """
    own = row.get("chat_template_kwargs") or {}
    if not isinstance(own, dict):
        raise UserError(f"its chat_template_kwargs must be a mapping, but is {own!r:.80}")
    for name in own.keys() & OURS:
        raise UserError(f"its chat_template_kwargs must not set {name}, which is fixed")
    # Parquet fills in what other rows have.
    return config.chat_template_kwargs | {k: v for k, v in own.items() if v is not None}


def require_template_options(options, *owners):
    """UserError for an option that is not free, or that no chat template mentions: it would do
    nothing, as one that is spelt wrong. owners: tokenizer and processor, or None."""
    for name in options.keys() & OURS:
        raise UserError(f"chat_template_kwargs must not set {name}, which is fixed.")
    texts = " ".join(str(owner.chat_template) for owner in owners if owner is not None)
    known = ("chat_template", "documents", "sanitize_control_tokens", "tools")  # not the template's
    for name in options:
        if name not in known and not re.search(rf"\b{re.escape(str(name))}\b", texts):
            raise UserError(
                f"chat_template_kwargs sets {name}, which the model's chat template does not read; "
                "look at the spelling, or leave it out."
            )


def encode(prompt, tokenizer, row=None):
    """Token ids of a prompt, with the row's images and template_options; chat templates bring their
    own special tokens.

    A text gets those that the tokenizer puts before it, once, and none after it: a completion
    follows, which an EOS would have ended.
    """
    row = row or {}
    options = row.get("_template_options")
    if row.get("_images") is not None:
        return row["_images"].encode(prompt, options)
    text, _ = render(prompt, tokenizer, options)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not isinstance(prompt, str):
        return ids
    full = tokenizer(text)["input_ids"]
    start = next((k for k in range(len(full)) if full[k : k + len(ids)] == ids), 0)
    return ids if ids[:start] == full[:start] else full[:start] + ids


def end_of_turn(tokenizer):
    """What the chat template writes after an assistant's turn, and its token id where that is one
    control token, else None; ("", None) without a template.
    """
    if tokenizer.chat_template is None:
        return "", None
    said = "Said"
    turn = [{"role": "user", "content": "Asked"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # it wants other roles, or more of them
        return "", None
    end = text.rpartition(said)[2].strip()
    control = _control_pattern(tokenizer).match(end)
    return (control[0], tokenizer.convert_tokens_to_ids(control[0])) if control else (end, None)


def require_plain(row, tokenizer):
    """Messages and hints with control tokens are refused: they would forge the end of a turn.

    A prompt or teacher_prompt that is a text may have them, it is what the model reads.
    """
    texts = []
    if not row.get("teacher_prompt"):
        texts.append(("privileged context", row.get("privileged_context") or ""))
    for name in ("prompt", "teacher_prompt"):
        if row.get(name) and not isinstance(row[name], str):
            texts += [(name, str(message)) for message in row[name]]  # roles and tool calls too
    for name, text in texts:
        if row.get("_images"):
            text = text.replace("<image>", "")
        if token := control_token(text, tokenizer):
            raise UserError(
                f"its {name} spells the control token {token!r}, which is no text to the model and "
                "may end a turn; remove the row or write it otherwise"
            )


def privileged_prompt(row, template, tokenizer, placement="text"):
    """The teacher's prompt of a row or None without one; its teacher_prompt column wins.

    Raises UserError, a clause that the caller completes with the row's name.
    """
    privileged = row.get("teacher_prompt") or None
    if privileged is not None and not isinstance(privileged, str) and not is_chat(privileged):
        raise UserError(f"its teacher_prompt is neither a text nor a chat but {privileged!r:.80}")
    require_plain(row, tokenizer)
    if privileged is None and row.get("privileged_context") is not None:
        if placement == "turn" and row.get("_images") and row["privileged_context"]:
            raise UserError(
                "it has images, which hint_placement turn would show twice; set it to text"
            )
        return insert_hint(
            row["prompt"], row["privileged_context"], template, tokenizer.bos_token, placement
        )
    return privileged


def require_same_start(row, privileged, tokenizer, template_options=None, placement="text"):
    """The response must start at the same assistant boundary after both prompts, and a hint may
    not write another, else UserError. As a turn of its own it must also stand whole in it.
    """
    (text, start), (hinted, boundary) = (
        render(prompt, tokenizer, template_options) for prompt in (row["prompt"], privileged)
    )
    if start != boundary:
        raise UserError(
            f"the assistant turn starts with {start!r} for the student but {boundary!r} for the "
            "privileged prompt, so the response would shift"
        )
    turn, hint = start.strip(), row.get("privileged_context")
    if placement == "turn" and hint and not row.get("teacher_prompt"):
        if hint.strip() not in hinted:
            raise UserError(
                "the chat template drops a part of its privileged context (thoughts, say) from an "
                "earlier assistant turn; set hint_placement to text, or write it otherwise"
            )
        # The exchange brings one more start of a turn: hold it against a harmless hint's.
        text, _ = render(
            insert_hint(row["prompt"], "0", "", placement="turn"), tokenizer, template_options
        )
    if turn and not row.get("teacher_prompt") and text.count(turn) != hinted.count(turn):
        raise UserError(
            f"its privileged context writes {turn!r}, with which an assistant turn starts, so that "
            "the teacher would read one more than the student; remove the row or write it otherwise"
        )


def teacher_prompt(
    row, name, tokenizer, template, *, placement="text", allow_missing=False, template_options=None,
    check_start=True,
):
    """What the teacher reads for a row of prompt, teacher_prompt and privileged_context (any type).

    None where the hint is missing and may be. check_start: also compare the assistant boundary.
    Raises UserError, a sentence that starts with `name`.
    """
    hint = "" if row["privileged_context"] is None else str(row["privileged_context"])
    if not row.get("teacher_prompt") and not hint.strip():
        if allow_missing:
            return None
        raise UserError(
            f"{name} has no privileged context, so it would silently train as plain GRPO; fill "
            "teacher_prompt, privileged_context or solution, or set "
            "allow_missing_privileged_context."
        )
    try:
        if not isinstance(row["prompt"], str) and not is_chat(row["prompt"]):
            raise UserError("its prompt is neither a text nor messages with text content")
        row = {**row, "privileged_context": hint}
        privileged = privileged_prompt(row, template, tokenizer, placement)
        if check_start:
            require_same_start(row, privileged, tokenizer, template_options, placement)
    except UserError as error:
        raise UserError(f"{name} cannot be used: {error}.") from None
    return privileged


def encode_pair(row, tokenizer, template, placement="text"):
    """(student ids, privileged ids or None) of a row; its teacher_prompt column wins.

    Raises UserError, a clause that the caller completes with the row's name.
    """
    prompt, privileged = row["prompt"], privileged_prompt(row, template, tokenizer, placement)
    student_ids = encode(prompt, tokenizer, row)
    if not student_ids:
        raise UserError("its prompt has no token")
    if privileged is None:
        return student_ids, None
    require_same_start(row, privileged, tokenizer, row.get("_template_options"), placement)
    teacher_ids = encode(privileged, tokenizer, row)
    if not teacher_ids:
        raise UserError("its privileged prompt has no token")
    return student_ids, teacher_ids
