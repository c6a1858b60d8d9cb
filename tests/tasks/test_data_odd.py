"""Data sets that are legal and odd: what must not turn silently into other data."""

import io

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_data import CHAT, numbered, sentence, write

from rlsd import TrainConfig, UserError
from rlsd.tasks.data import load_rows, question, split_rows


@pytest.mark.parametrize("row", [
    {"prompt": "write f", "tests": ""}, {"prompt": "write f", "tests": " \n"},
    {"text": "write f", "test_list": []}, {"text": "write f", "test_list": [""]},
    {"prompt": "write f", "tests": {"functional": ""}},
], ids=str)
def test_tests_that_nothing_fails_are_none(row, tmp_path):
    path = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(UserError) as error:  # every program would be right
        load_rows(path)
    sentence(error, f"line 1 of {path}", "no solution")
    (got,) = load_rows(write(tmp_path / "x.jsonl", [{"solution": "4", **row}]))
    assert got["tests"] is None and got["solution"] == "4"


def test_an_mbpp_row_without_a_task_names_the_row(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"question": "f?", "test_list": ["assert f()"]}])
    with pytest.raises(UserError) as error:  # it was asked "None"
        load_rows(path)
    sentence(error, f"line 1 of {path}", "test_list")


@pytest.mark.parametrize("row, hint", [
    ({"answer": "4", "solution": "2 and 2 make 4."}, "2 and 2 make 4."),  # LIMO
    ({"answer": "2 and 2 #### 4", "solution": "4"}, "2 and 2 #### 4"),
    ({"answer": "4", "solution": " "}, "4"), ({"answer": "4", "solution": None}, "4"),
    ({"answer": "4", "solution": "2 and 2", "privileged_context": "think"}, "think"),
], ids=str)
def test_a_worked_solution_beside_question_and_answer_is_the_hint(row, hint, tmp_path):
    (got,) = load_rows(write(tmp_path / "x.jsonl", [{"question": "2+2?", **row}]))
    assert got["solution"] == "4" and got["privileged_context"] == hint


@pytest.mark.parametrize("column", [
    lambda x: {"prompt": "2+2?", "solution": x}, lambda x: {"question": "2+2?", "answer": x},
    lambda x: {"problem": "2+2?", "answer": x},
    lambda x: {"prompt": CHAT, "reward_model": {"ground_truth": x}},
], ids=["ours", "gsm8k", "math", "verl"])
def test_numbers_as_solutions(column, tmp_path):
    def read(value):
        return load_rows(write(tmp_path / "x.jsonl", [column(value)]))[0]["solution"]

    assert [read(x) for x in (4, 4.0, -4.0, 0.5)] == ["4", "4", "-4", "0.5"]
    for value in (float("nan"), float("inf")):  # as pandas writes a gap
        with pytest.raises(UserError, match="has no solution"):
            read(value)


def as_bytes(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("column", ["images", "image"])
def test_another_picture_is_another_question(column, tmp_path):
    # geometry3k asks "<image>Find x." again and again.
    pictures = [{"bytes": as_bytes((i, 0, 0)), "path": None} for i in (1, 2, 3, 1)]
    rows = [
        {"problem": "<image>Find x.", "answer": "4", column: [p] if column == "images" else p}
        for p in pictures
    ]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    rows = load_rows(str(path))
    names = [question(row) for row in rows]
    assert names[0] == names[3] and len(set(names)) == 3
    train, held_out = split_rows(rows, TrainConfig(train_dataset="x", eval_split_size=1))
    assert len(held_out) == 1 and not {*map(question, train)} & {*map(question, held_out)}
    path.with_suffix(".png").write_bytes(as_bytes((5, 0, 0)))
    opened = [{"prompt": "Find x.", column: x} for x in (
        Image.new("RGB", (4, 4), (5, 0, 0)), str(path.with_suffix(".png")), None
    )]
    assert len({*map(question, opened)}) == 3
    assert question({"prompt": "q0"}) == question({**numbered(1)[0], column: None})
