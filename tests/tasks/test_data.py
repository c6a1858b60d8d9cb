import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest

from rlsd import TrainConfig, UserError
from rlsd.demo import character_tokenizer
from rlsd.tasks.data import (
    SOURCE,
    UNUSABLE_TASKS,
    load_data,
    load_rows,
    read_tests,
    shuffle_hints,
    tokenize_rows,
)
from rlsd.tasks.prompts import encode

ROW = {"prompt": "2+2?", "solution": "4"}
CHAT = [{"role": "user", "content": "2+2?"}]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def tokenizer(template=None):
    made = character_tokenizer(["".join(map(chr, range(32, 127))), "\n"])
    made.chat_template = template
    return made


def options(path, **other):
    return TrainConfig(train_dataset=path, **{"eval_size": 0, **other})


def columns(rows, *names):
    return [tuple(row.get(name) for name in names) for row in rows]


def sentence(error, *parts):
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message, message
    for part in parts:
        assert str(part) in message, message


def numbered(n, **other):
    return [{"prompt": f"q{i}", "solution": f"s{i}", **other} for i in range(n)]


def test_jsonl_keeps_columns_and_names_each_row(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [ROW | {"level": 3}, {"prompt": CHAT, "solution": 4, "privileged_context": "2+2=4"}]
    path.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]), encoding="utf-8")
    got = load_rows(str(path))
    assert columns(got, "prompt", "solution", "privileged_context", "level", SOURCE) == [
        ("2+2?", "4", "4", 3, f"line 1 of {path}"),
        (CHAT, "4", "2+2=4", None, f"line 3 of {path}"),  # the blank line counts
    ]


def test_parquet_reads_the_same_rows_as_jsonl(tmp_path):
    rows = [ROW, {"prompt": "3+3?", "solution": "6"}]
    names = ("prompt", "solution", "privileged_context")
    from_parquet = load_rows(parquet(tmp_path / "x.parquet", rows))
    assert columns(from_parquet, *names) == columns(
        load_rows(write(tmp_path / "x.jsonl", rows)), *names
    )
    assert from_parquet[1][SOURCE] == f"1 of {tmp_path / 'x.parquet'}"


def test_gsm8k_columns(tmp_path):
    answer = "#### Steps\nHe has 2 and buys 2 <<2+2=4>>.\n#### 1,004"
    rows = load_rows(write(tmp_path / "x.jsonl", [{"question": "How many?", "answer": answer}]))
    assert columns(rows, "prompt", "solution", "privileged_context") == [
        ("How many?", "1,004", answer)
    ]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat-model"])
def test_gsm8k_questions_become_chats_where_the_tokenizer_has_a_template(tmp_path, template):
    path = write(tmp_path / "x.jsonl", [{"question": "2+2?", "answer": "#### 4"}])
    (row,), _ = load_data(options(path), tokenizer(template), log=pytest.fail)
    want = "2+2?" if template is None else [{"role": "user", "content": "2+2?"}]
    assert row["prompt"] == want and row["prompt_ids"] == encode(want, tokenizer(template))


@pytest.mark.parametrize("answer", [None, ""], ids=repr)
def test_gsm8k_row_without_an_answer_names_the_row(tmp_path, answer):
    path = write(tmp_path / "x.jsonl", [{"question": "2+2?", "answer": answer}])
    with pytest.raises(UserError) as error:
        load_rows(path)
    sentence(error, "line 1 of", "no solution")


def test_verl_parquet(tmp_path):
    row = {
        "data_source": "openai/gsm8k", "prompt": CHAT, "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"answer": "2+2=4 #### 4", "index": 0},
    }
    bare = row | {"extra_info": {"answer": None, "index": 1}}
    rows = load_rows(parquet(tmp_path / "x.parquet", [row, bare]))
    assert columns(rows, "prompt", "solution", "privileged_context") == [
        (CHAT, "4", "2+2=4 #### 4"), (CHAT, "4", "4"),
    ]
    (number,) = load_rows(write(tmp_path / "x.jsonl", [row | {"extra_info": {"answer": 4.0}}]))
    assert number["privileged_context"] == "4"


@pytest.mark.parametrize("content, parts", [
    (b'{"prompt": "a", "solution": "b"}\n{"prompt": \n', ["line 2 of", "not valid JSON", "column"]),
    (b'{"prompt": "a", "solution": "b"}\n["a", "b"]\n', ["line 2 of", "JSON object"]),
    (b'{"solution": "b"}\n', ["line 1 of", "no prompt"]),
    (b'{"prompt": "a"}\n', ["line 1 of", "no solution"]),
    (b'{"prompt": "", "solution": "b"}\n', ["line 1 of", "no prompt"]),
    (b'{"prompt": [], "solution": "b"}\n', ["line 1 of", "no prompt"]),
    (b'{"prompt": "a", "solution": null}\n', ["line 1 of", "no solution"]),
    (b'{"prompt": 5, "solution": "b"}\n', ["line 1 of", "text or a list of messages"]),
    (b'{"prompt": [{"role": "user"}], "solution": "b"}\n', ["line 1 of", "messages"]),
    (b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "solution": "b"}\n',
     ["line 1 of", "text content"]),
    (b'{"prompt": "a", "solution": "b", "privileged_context": [1]}\n',
     ["line 1 of", "privileged_context"]),
    (b"\n \n", ["no rows"]),
    (b"", ["no rows"]),
    (b'{"prompt": "\xff", "solution": "b"}\n', ["not UTF-8"]),
], ids=["json", "not-an-object", "no-prompt", "no-solution", "empty-prompt", "empty-chat",
        "null-solution", "number-prompt", "no-content", "image", "hint-type", "blank-file",
        "empty-file", "not-utf8"])
def test_bad_jsonl_names_the_row_and_the_file(tmp_path, content, parts):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_rows(str(path))
    sentence(error, path, *parts)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.csv", "x.txt"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError) as error:
        load_rows(str(tmp_path / name))
    sentence(error, tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b'{"a": 1}'], ids=repr)
def test_malformed_parquet_is_named(tmp_path, content):
    path = tmp_path / "bad.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_rows(str(path))
    sentence(error, path)


def test_parquet_row_without_a_solution_is_named(tmp_path):
    path = parquet(tmp_path / "x.parquet", [ROW, {"prompt": "a", "solution": None}])
    with pytest.raises(UserError) as error:
        load_rows(path)
    sentence(error, f"1 of {path}", "no solution")


@pytest.mark.parametrize("name", ["x.json", "x.csv"])
def test_other_extensions_are_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError) as error:
        load_rows(str(tmp_path / name))
    sentence(error, name, "neither .jsonl nor .parquet")


def test_a_hub_id_that_cannot_be_loaded_says_so():
    with pytest.raises(UserError) as error:
        load_rows("nobody/has-this-data-set")
    sentence(error, "nobody/has-this-data-set", "neither a file nor a hub dataset")


@pytest.mark.parametrize("failure", [RuntimeError(), OSError("two\nlines")], ids=repr)
def test_a_failing_hub_is_one_sentence(monkeypatch, failure):
    import datasets

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as error:
        load_rows("some/set")
    sentence(error, "some/set", type(failure).__name__)


def test_hub_rows_and_config_name(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return [{"question": "q", "answer": "#### 4"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("openai/gsm8k:main") + load_rows("some/set@test")
    assert asked == [("openai/gsm8k", "main", "train"), ("some/set", None, "test")]
    assert columns(rows, "solution", SOURCE) == [
        ("4", "0 of openai/gsm8k:main"), ("4", "0 of some/set@test")
    ]


def test_reasoning_gym_rows():
    rows = load_rows("reasoning-gym:chain_sum", size=5, seed=3)
    assert len(rows) == 5 and [row[SOURCE] for row in rows][4] == "4 of reasoning-gym:chain_sum"
    for row in rows:
        assert row["prompt"] == row["entry"]["question"]
        assert row["solution"] == row["privileged_context"] == row["entry"]["answer"]
        # "State the final answer to the following arithmetic problem: 4 + 3 ="
        assert eval(row["prompt"].rpartition(":")[2].strip(" =")) == int(row["solution"])
    again = load_rows("reasoning-gym:chain_sum", size=5, seed=3)
    assert columns(again, "prompt") == columns(rows, "prompt")
    other = load_rows("reasoning-gym:chain_sum", size=5, seed=4)
    assert columns(other, "prompt") != columns(rows, "prompt")


def test_reasoning_gym_tasks_alternate():
    rows = load_rows("reasoning-gym:chain_sum, spell_backward", size=5)
    assert [row["task"] for row in rows] == ["chain_sum", "spell_backward"] * 2 + ["chain_sum"]


@pytest.mark.parametrize("task", UNUSABLE_TASKS)
def test_unusable_task_is_refused(task):
    with pytest.raises(UserError) as error:
        load_rows(f"reasoning-gym:chain_sum,{task}", size=2)
    sentence(error, task, "full marks")


@pytest.mark.parametrize("spec, parts", [
    ("reasoning-gym:chain_sums", ["'chain_sums'"]), ("reasoning-gym:", ["task name"]),
    ("reasoning-gym: ,", ["task name"]),
])
def test_unknown_task_is_one_sentence(spec, parts):
    with pytest.raises(UserError) as error:
        load_rows(spec, size=2)
    sentence(error, *parts)


@pytest.mark.parametrize("task", UNUSABLE_TASKS)
def test_unusable_tasks_really_fail_their_own_scorer(task):
    import reasoning_gym

    data = reasoning_gym.create_dataset(task, size=3, seed=0)
    scores = [data.score_answer(entry["answer"], entry=entry) for entry in data]
    assert min(scores) < 1


@pytest.mark.parametrize("task", [
    "chain_sum", "spell_backward", "gcd", "leg_counting", "base_conversion", "basic_arithmetic",
])
def test_stored_answers_get_full_marks(task):
    from rlsd.tasks.scorers import reasoning_gym

    rows = load_rows(f"reasoning-gym:{task}", size=10)
    scores = reasoning_gym(
        None, [f"so <answer>{row['privileged_context']}</answer>" for row in rows],
        entry=[row["entry"] for row in rows], task=[row["task"] for row in rows],
    )
    assert scores == [1.0] * 10


def test_ids_are_the_encoded_prompts(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW | {"privileged_context": "2+2=4"}])
    (row,), held_out = load_data(options(path), tokenizer())
    assert held_out == []
    assert tokenizer().decode(row["prompt_ids"]) == "2+2?"
    assert tokenizer().decode(row["teacher_prompt_ids"]) == "Reference solution:\n2+2=4\n\n2+2?"


@pytest.mark.parametrize("config", [
    {"objective": "grpo"}, {"rlsd_lambda": 0.0},
], ids=["grpo", "lambda-0"])
def test_without_a_teacher_nothing_is_privileged(tmp_path, config):
    rows = [ROW | {"privileged_context": ""}, ROW]
    got, _ = load_data(options(write(tmp_path / "x.jsonl", rows), **config), tokenizer())
    assert [row["teacher_prompt_ids"] for row in got] == [None, None]


@pytest.mark.parametrize("limit, lengths", [(3, [3, 2]), (4, [3, 4, 2]), (None, [3, 4, 5, 2])])
def test_over_long_prompts_are_dropped_and_counted_never_cut(tmp_path, limit, lengths):
    prompts = ["abc", "abcd", "abcde", "ab"]
    path = write(tmp_path / "x.jsonl", [{"prompt": p, "solution": "4"} for p in prompts])
    notes = []
    rows, _ = load_data(options(path, max_prompt_length=limit), tokenizer(), log=notes.append)
    kept = [p for p in prompts if limit is None or len(p) <= limit]
    assert [tokenizer().decode(row["prompt_ids"]) for row in rows] == kept
    assert [len(row["prompt_ids"]) for row in rows] == lengths
    if len(kept) == 4:
        assert notes == []
    else:
        first = next(i for i, p in enumerate(prompts) if p not in kept)
        assert notes == [
            f"Dropped {4 - len(kept)} of 4 rows as over-long; first: row line {first + 1} of "
            f"{path} with a prompt of {len(prompts[first])} tokens, limit {limit}."
        ]


def test_over_long_hints_drop_the_row_only_where_a_teacher_reads_them(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW | {"privileged_context": "h" * 50}, ROW])
    notes = []
    rows, _ = load_data(options(path, max_teacher_prompt_length=40), tokenizer(), notes.append)
    assert [row[SOURCE] for row in rows] == [f"line 2 of {path}"]
    assert "privileged prompt of 76 tokens, limit 40" in notes[0]
    grpo = options(path, max_teacher_prompt_length=40, objective="grpo")
    assert len(load_data(grpo, tokenizer(), pytest.fail)[0]) == 2


def test_all_rows_dropped_is_an_error(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW, ROW])
    with pytest.raises(UserError) as error:
        load_data(options(path, max_prompt_length=2), tokenizer())
    sentence(error, "No row is left", "Dropped 2 of 2", "limit 2")


@pytest.mark.parametrize("empty", ["", "  \n", None], ids=repr)
def test_missing_privileged_context_names_the_row(tmp_path, empty):
    path = write(tmp_path / "x.jsonl", [ROW, ROW | {"privileged_context": empty}])
    with pytest.raises(UserError) as error:
        load_data(options(path), tokenizer())
    sentence(error, f"line 2 of {path}", "privileged context", "allow_missing_privileged_context")


@pytest.mark.parametrize("empty", ["", "  \n"], ids=repr)
def test_missing_privileged_context_may_be_allowed(tmp_path, empty):
    path = write(tmp_path / "x.jsonl", [ROW, ROW | {"privileged_context": empty}])
    rows, _ = load_data(options(path, allow_missing_privileged_context=True), tokenizer())
    assert rows[0]["teacher_prompt_ids"] is not None and rows[1]["teacher_prompt_ids"] is None


def test_teacher_prompt_stands_in_for_privileged_context(tmp_path):
    row = ROW | {"privileged_context": "", "teacher_prompt": "4 it is. 2+2?"}
    (got,), _ = load_data(options(write(tmp_path / "x.jsonl", [row])), tokenizer())
    assert tokenizer().decode(got["teacher_prompt_ids"]) == "4 it is. 2+2?"


def test_unusable_prompts_name_the_row(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW, {"prompt": CHAT, "solution": "4"}])
    with pytest.raises(UserError) as error:
        load_data(options(path), tokenizer())
    sentence(error, f"line 2 of {path}", "cannot be used", "no chat template")


def test_tokenize_rows_leaves_its_input_alone():
    rows = [ROW | {"privileged_context": "h", SOURCE: "x"}]
    before = json.dumps(rows)
    tokenize_rows(rows, tokenizer(), options("x.jsonl"), need_hint=True)
    assert json.dumps(rows) == before


@pytest.mark.parametrize("n", [2, 3, 10])
def test_shuffled_hints_are_a_derangement_of_the_same_hints(n):
    rows = [{"privileged_context": f"h{i}", "prompt": f"q{i}", "solution": "4"} for i in range(n)]
    got = shuffle_hints(rows)
    hints = [row["privileged_context"] for row in got]
    assert sorted(hints) == sorted(row["privileged_context"] for row in rows)
    assert all(a["privileged_context"] != b for a, b in zip(rows, hints, strict=True))
    assert columns(got, "prompt", "solution") == columns(rows, "prompt", "solution")
    assert rows[0]["privileged_context"] == "h0"


def test_shuffling_also_drops_the_rows_own_teacher_prompt(tmp_path):
    rows = [ROW | {"teacher_prompt": "secret 2+2?"}, {"prompt": "3+3?", "solution": "6"}]
    path = write(tmp_path / "x.jsonl", rows)
    got, _ = load_data(options(path, shuffle_privileged_context=True), tokenizer())
    texts = [tokenizer().decode(row["teacher_prompt_ids"]) for row in got]
    assert texts == ["Reference solution:\n6\n\n2+2?", "Reference solution:\n4\n\n3+3?"]


def test_a_single_row_has_no_other_hint_to_get():
    with pytest.raises(UserError, match="two rows"):
        shuffle_hints([{"privileged_context": "h"}])


CASES = {"cases": [["1 2", "3"], ["3 4", "7"]], "fn_name": None}
CALLS = {"cases": [[[1, "a"], [2]], [[3, "b"], [4]]], "fn_name": "f"}


@pytest.mark.parametrize("tests, want", [
    ({"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}, CASES),
    ({"inputs": ["1 2", "3 4"], "outputs": ["3", "7"], "fn_name": None}, CASES),
    ('{"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}', CASES),
    ({"inputs": [["1 2"], ["3 4"]], "outputs": [["3"], ["7"]]}, CASES),  # lists of lines
    ([{"input": "1 2", "output": "3", "testtype": "stdin"},
      {"input": "3 4", "output": "7", "testtype": "stdin"}], CASES),
    ({"language": "python", "test_cases": [{"input": "1 2", "output": "3", "type": "stdin_stdout"},
                                           {"input": "3 4", "output": "7"}]}, CASES),
    ({"inputs": [[1, "a"], [3, "b"]], "outputs": [[2], [4]], "fn_name": "f"}, CALLS),
    ({"inputs": ['1\n"a"', '3\n"b"'], "outputs": ["[2]", "[4]"], "fn_name": "f"}, CALLS),
    ([{"input": '1\n"a"', "output": "[2]", "metadata": {"func_name": "f"}},
      {"input": '3\n"b"', "output": "[4]", "metadata": {"func_name": "f"}}], CALLS),
    (["assert f(1)", "assert f(2)"], {"asserts": "assert f(1)\nassert f(2)"}),
    ({"assert_case": ["assert f(1)"]}, {"asserts": "assert f(1)"}),
    ({"functional": "def check(f): pass"}, {"asserts": "def check(f): pass"}),
    ("assert f(1) == [2]", {"asserts": "assert f(1) == [2]"}),
], ids=str)
def test_forms_of_tests(tests, want):
    assert read_tests(tests) == want
    assert read_tests(read_tests(tests)) == want


@pytest.mark.parametrize("tests, part", [
    ({"inputs": ["1", "2"], "outputs": ["1"]}, "2 inputs and 1 outputs"),
    ({"inputs": [], "outputs": []}, "0 inputs"),
    ({"input": "1"}, "must be assertions"),
    ([], "must be assertions"), (7, "must be assertions"), ([1, 2], "must be assertions"),
    ({"inputs": ["1"], "outputs": ["x"], "fn_name": "f"}, "not JSON"),
    ([{"input": "1", "output": "1", "fn_name": "f"}, {"input": "1", "output": "1"}], "several"),
], ids=str)
def test_bad_tests_name_the_row(tests, part, tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "write f", "tests": tests}])
    with pytest.raises(UserError) as error:
        load_rows(path)
    sentence(error, f"line 1 of {path}", part)


def test_verl_code_rows(tmp_path):
    row = {
        "data_source": "codeforces", "prompt": CHAT, "ability": "code", "extra_info": {"index": 3},
        "reward_model": {
            "style": "rule", "ground_truth": '{"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}'
        },
    }
    (got,) = load_rows(parquet(tmp_path / "x.parquet", [row]))
    assert got["tests"] == CASES and got["solution"] == got["privileged_context"] == ""
    assert got["data_source"] == "codeforces" and got["extra_info"] == {"index": 3}
    answer = row | {"extra_info": {"answer": "print(1)"}}
    (got,) = load_rows(parquet(tmp_path / "x.parquet", [answer]))
    assert got["privileged_context"] == "print(1)"
    with pytest.raises(UserError) as error:  # nothing that a teacher could be shown
        load_data(options(parquet(tmp_path / "x.parquet", [row])), tokenizer(TEMPLATE))
    sentence(error, "no privileged context")


@pytest.mark.parametrize("truth, want", [(["4"], "4"), ("4", "4"), (4, "4"), ("[1, 2]", "[1, 2]")])
def test_verl_answers(tmp_path, truth, want):
    row = {"prompt": CHAT, "reward_model": {"ground_truth": truth}}
    (got,) = load_rows(write(tmp_path / "x.jsonl", [row]))
    assert got["solution"] == want and "tests" not in got


@pytest.mark.parametrize("truth", [["4", "5"], {"a": 1}, []], ids=str)
def test_verl_answers_that_are_none(tmp_path, truth):
    path = write(tmp_path / "x.jsonl", [{"prompt": CHAT, "reward_model": {"ground_truth": truth}}])
    with pytest.raises(UserError) as error:
        load_rows(path)
    sentence(error, f"line 1 of {path}", "ground_truth")


def test_mbpp_rows(tmp_path):
    row = {"task_id": 2, "text": "Write f.", "code": "def f(): return 1",
           "test_list": ["assert f() == 1", "assert f() < 2"], "test_setup_code": "import math"}
    clean = {"task_id": 2, "prompt": "Write f.", "code": "def f(): return 1",
             "test_list": ["assert f() == 1", "assert f() < 2"], "test_imports": ["import math"]}
    for given in (row, clean):
        (got,) = load_rows(write(tmp_path / "x.jsonl", [given]))
        assert got["prompt"] == (
            "Write f.\nYour code should pass these tests:\nassert f() == 1\nassert f() < 2"
        )
        assert got["tests"] == {"asserts": "import math\nassert f() == 1\nassert f() < 2"}
        assert got["solution"] == got["privileged_context"] == "def f(): return 1"


def test_humaneval_rows(tmp_path):
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
           "test": "def check(candidate):\n    assert candidate() == 1", "entry_point": "f"}
    (got,) = load_rows(write(tmp_path / "x.jsonl", [row]))
    assert got["prompt"] == "def f():\n" and got["solution"] == "    return 1\n"
    assert got["tests"] == {
        "asserts": row["test"] + "\ncheck(f)", "prefix": "def f():\n", "entry_point": "f"
    }


# As Qwen3's: a switch that leaves an empty thought at the start of the answer.
SWITCHED = TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}{{ style }}"


@pytest.mark.parametrize("write_as", [write, parquet])
def test_template_options_of_all_rows_and_of_one(tmp_path, write_as):
    given = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "solution": "4",
         "chat_template_kwargs": own} for i, own in enumerate(
            ({"enable_thinking": True}, {"style": "short"}, {"enable_thinking": False})
        )
    ]
    path, made = write_as(tmp_path / f"x.{write_as.__name__}".replace("write", "jsonl"), given), (
        tokenizer(SWITCHED)
    )
    for common, want in (
        ({}, ["", "short", "<think></think>"]),
        ({"enable_thinking": False}, ["", "<think></think>short", "<think></think>"]),
        ({"style": "long"}, ["long", "short", "<think></think>long"]),
    ):
        config = options(path, chat_template_kwargs=common, privileged_template=(
            "{privileged_context} {prompt}"
        ))
        rows, _ = load_data(config, made, log=pytest.fail)
        for i, (row, end) in enumerate(zip(rows, want, strict=True)):
            assert made.decode(row["prompt_ids"]) == f"[user]{i}?[assistant]{end}"
            assert made.decode(row["teacher_prompt_ids"]) == f"[user]4 {i}?[assistant]{end}"
        _, (held_out,) = load_data(dataclasses.replace(config, eval_size=1), made, log=pytest.fail)
        assert made.decode(held_out["prompt_ids"]) == f"[user]2?[assistant]{want[2]}"


@pytest.mark.parametrize("own, words", [
    ("enable_thinking", "its chat_template_kwargs must be a mapping, but is 'enable_thinking'"),
    ([False], "must be a mapping, but is [False]"),
    ({"tokenize": True}, "its chat_template_kwargs must not set tokenize, which is fixed"),
    ({"style": {"x": 1}, "chat_template": "{{ style.y.z }}"}, "its chat template fails with Undef"),
])
def test_template_options_that_cannot_be_used_name_the_row(tmp_path, own, words):
    rows = [{"prompt": CHAT, "solution": "4"}] * 2
    path = write(tmp_path / "x.jsonl", [*rows, {**rows[0], "chat_template_kwargs": own}])
    with pytest.raises(UserError) as error:
        load_data(options(path), tokenizer(SWITCHED), log=pytest.fail)
    sentence(error, f"Row line 3 of {path} cannot be used: ", words)


def test_an_option_that_the_template_does_not_read_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": CHAT, "solution": "4"}])
    for template in (SWITCHED, TEMPLATE, None):
        config = options(path, chat_template_kwargs={"enable_thinkng": False})
        with pytest.raises(UserError) as error:
            load_data(config, tokenizer(template), log=pytest.fail)
        sentence(error, "sets enable_thinkng, which the model's chat template does not read")
    fixed = options(path, chat_template_kwargs={"add_generation_prompt": False})
    with pytest.raises(UserError) as error:
        load_data(fixed, tokenizer(SWITCHED), log=pytest.fail)
    sentence(error, "chat_template_kwargs must not set add_generation_prompt, which is fixed")
    other = options(path, chat_template_kwargs={"chat_template": "<{{ messages[0].content }}>"})
    (row,), _ = load_data(other, tokenizer(SWITCHED), log=pytest.fail)
    assert tokenizer().decode(row["prompt_ids"]) == "<2+2?>"
