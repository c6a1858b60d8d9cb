"""Rows that no data set should hold: each is one sentence that names the row."""

import json

import pytest

from rlsd import UserError
from rlsd.tasks.data import load_rows, tokenize_rows

HUGE, DEEP = "1" * 5000, "[" * 100_000 + "]" * 100_000


def load(tmp_path, line):
    path = tmp_path / "x.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(line.replace("HUGE", HUGE).replace("DEEP", DEEP))
    return load_rows(str(path))


GOOD = {"prompt": "q", "solution": "4"}
CODE = {"prompt": "q"}


@pytest.mark.parametrize("line, parts", [
    ({**GOOD, "prompt": "\ud800"}, ["surrogate", "ud800"]),
    ({**GOOD, "solution": "a\udfff"}, ["surrogate"]),
    ({**GOOD, "privileged_context": "\ud83d"}, ["surrogate"]),
    ({"prompt": [{"role": "user", "content": "\ud83d"}], "solution": "4"}, ["surrogate"]),
    ({**GOOD, "note": {"a": ["\ud800"]}}, ["surrogate"]),
    ('{"prompt": "q", "solution": HUGE}', ["cannot be read", "4300"]),
    ('{"prompt": "q", "solution": DEEP}', ["cannot be read", "recursion"]),
    *(({**GOOD, name: "x"}, ["column", name]) for name in (
        "prompts", "completions", "completion_ids", "prompt_ids", "teacher_prompt_ids", "_images",
        "_source", "_as_chat", "_reference_ids", "_opening",
    )),
    ({**CODE, "test_list": [1, 2]}, ["test_list", "1"]),
    ({**CODE, "test_list": ["assert f(1)"], "test_setup_code": 5}, ["test_list", "5"]),
    ({**CODE, "tests": {"inputs": [1], "outputs": [1], "fn_name": 5}}, ["fn_name", "5"]),
    ({**CODE, "tests": {"inputs": [1], "outputs": [1], "fn_name": "f"}}, ["arguments"]),
    ({**CODE, "tests": {"cases": [1]}}, ["pairs"]),
    ({**CODE, "tests": [{"input": "1", "output": "2", "metadata": "x"}]}, ["tests", "known forms"]),
    ({**CODE, "tests": '{"inputs": [HUGE], "outputs": [1]}'}, ["tests cannot be read"]),
    ({**CODE, "tests": "DEEP"}, ["tests cannot be read"]),
    ({**CODE, "tests": {"inputs": ["HUGE"], "outputs": ["1"], "fn_name": "f"}}, ["not JSON"]),
], ids=lambda value: None if isinstance(value, list) else str(value)[:60])
def test_a_bad_row_is_one_sentence_that_names_it(tmp_path, line, parts):
    with pytest.raises(UserError) as error:
        load(tmp_path, line)
    message = str(error.value)
    assert message.startswith("Row line 1 of ") and message.endswith(".") and "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message


def test_whole_surrogate_pairs_and_long_texts_of_digits_are_texts(tmp_path):
    row = load(tmp_path, '{"prompt": "\\ud83d\\ude00", "solution": "HUGE"}')[0]
    assert row["prompt"] == "\U0001f600" and row["solution"] == HUGE


class Letters:
    """A tokenizer of characters, with a template that opens the thoughts."""

    chat_template, eos_token_id, bos_token, unk_token = "x", 0, None, None
    added_tokens_decoder, all_special_tokens = {}, ()

    def __init__(self, opening):
        self.opening = opening

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **_):
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return text + ("[assistant]" + self.opening) * add_generation_prompt


@pytest.mark.parametrize("opening, want", [
    ("", ""), ("<think>\n", "<think>\n"), ("<think>\n\n</think>\n\n",) * 2, ("<think>hm", ""),
])
def test_a_row_knows_what_the_template_opened(opening, want):
    from rlsd import TrainConfig

    row = {"prompt": [{"role": "user", "content": "<think> q"}], "solution": "4",
           "privileged_context": "4", "_source": "line 1"}
    ((kept,), _) = tokenize_rows([row], Letters(opening), TrainConfig(), need_hint=False)
    assert kept["_opening"] == want
