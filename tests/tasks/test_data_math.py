"""MATH's columns: a worked solution whose box is the answer, or an answer of its own."""

import pytest
from runs import write_rows

from rlsd import UserError
from rlsd.tasks.data import load_rows


@pytest.mark.parametrize("row, solution, hint", [
    ({"solution": r"So $x = \boxed{\frac{1}{\sqrt{2^{3}}}}$.", "level": "Level 5"},
     r"\frac{1}{\sqrt{2^{3}}}", None),  # hendrycks and its copies
    ({"solution": r"Half, $\boxed{1}$ of $\boxed{2}$.", "answer": "3"}, "3", None),  # MATH-500
    ({"solution": r"$\boxed{1}$, or $\boxed{2"}, "1", None),  # the last box never closes
    ({"solution": "42"}, "42", "42"),
    ({"answer": "7"}, "7", "7"),  # geometry3k: nothing worked
    ({"solution": r"\boxed{4}", "privileged_context": "think of 2"}, "4", "think of 2"),
])
def test_math_columns(tmp_path, row, solution, hint):
    (got,) = load_rows(write_rows(tmp_path / "x.jsonl", [{"problem": "Find $x$.", **row}]))
    assert got["prompt"] == "Find $x$." and got["_as_chat"] and got["solution"] == solution
    assert got["privileged_context"] == (row["solution"] if hint is None else hint)


def test_a_math_row_without_an_answer_names_the_row(tmp_path):
    with pytest.raises(UserError) as error:
        load_rows(write_rows(tmp_path / "x.jsonl", [{"problem": "Find $x$.", "solution": ""}]))
    assert str(error.value) == f"Row line 1 of {tmp_path / 'x.jsonl'} has no solution."
