"""Where texts state their answers, and that reading them is linear in their length."""

import time

import pytest

from rlsd.tasks.answers import final_answer, is_wording, quantity, readings, stated, states, wording


@pytest.mark.parametrize("text, want", [
    ("42", "42"),
    ("  42\n", "42"),
    ("so <answer> 42 </answer>", "42"),
    ("<answer>1</answer> no, <answer>2</answer>", "2"),
    ("<answer>two\nlines</answer>", "two\nlines"),
    ("<answer>1</answer> #### 2", "1"),  # the tag wins
    ("<answer>1 <answer>2</answer>", "2"),
    ("<answer>1</answer> and </answer>", "1"),
    ("<answer>\\boxed{42}</answer>", "42"),
    ("<answer>#### 42</answer>", "42"),
    ("a #### 1 #### 2", "2"),
    ("#### 42\nSo it is.", "42"),
    ("#### 42 ####", "42"),  # a heading in Markdown may be closed
    ("#### Final answer\n42", "42"),
    ("#### The final answer is: 42", "42"),
    ("#### answer", "answer"),
    ("#### Final answer\n\\boxed{42}", "42"),
    ("#### \\boxed{42}", "42"),
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{x^{2}} or \\boxed{\\frac{\\sqrt{3}}{2}}.", "\\frac{\\sqrt{3}}{2}"),
    ("\\boxed{a{b{c{d{e}}}}}", "a{b{c{d{e}}}}"),
    ("\\boxed {42}", "42"),
    ("\\fbox{42}", "42"),
    ("\\boxed 42.", "42"),
    ("\\\\boxed{42}", "42"),  # escaped once too often
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
    ("\\boxed{1} and \\boxed{2", "1"),
    ("\\boxed{\\boxed{42}}", "42"),
    ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
    ("<think>hm</think>\n42", "42"),
    ("<answer>unclosed", "<answer>unclosed"),
    ("\\boxed{unclosed", "\\boxed{unclosed"),
    ("", ""),
])
def test_final_answer(text, want):
    assert final_answer(text) == want


SOLUTIONS = ["42", "-1/2", "\\frac{1}{2}", "1 2\n3 4", "east", "[[1, 2], [3, 4]]", "a\n\nb", "{x}"]


@pytest.mark.parametrize("solution", SOLUTIONS)
@pytest.mark.parametrize("held", ["{}", "<answer>{}</answer>", "#### {}", "\\boxed{{{}}}",
                                  "So it is.\n#### {}", "Thus $\\boxed{{{}}}$.",
                                  "<think>hm</think>{}"])
def test_every_solution_states_itself_in_every_form(solution, held):
    given = held.format(solution)
    for said in ("{}", "I say <answer>{}</answer>", "hm\n#### {}", "so \\boxed{{{}}}",
                 "<answer>\\boxed{{{}}}</answer>", "#### Answer:\n\\boxed{{{}}}"):
        assert states(said.format(solution), solution), said
        # What is said and what the data holds may have forms of their own.
        assert states(said.format(solution), given) or "\n" in solution and "####" in held, said
        assert states(given, given)
        assert not states(said.format("other"), given), said


@pytest.mark.parametrize("text", [
    "\\boxed{1} or #### 2", "<answer>1</answer> or \\boxed{2}", "\\boxed{1}, \\boxed{2}",
    "<think>\\boxed{1}</think>2", "<answer>1</answer><answer>2</answer>",
    "#### 1\nrather \\boxed{2}",
])
def test_a_text_states_one_answer(text):
    assert sum(states(text, solution) for solution in ("1", "2")) == 1


@pytest.mark.parametrize("mark", [
    "<answer>", "</answer>", "<answer>1", "####", "#### a\n", "\\boxed{", "\\boxed ", "\\boxed",
    "\\", "{", "}", "<think>", "answer is ", "5 a", "1 000 ", "a, ", "\\text{",
])
def test_reading_is_linear(mark):
    text = mark * (400_000 // len(mark))
    began = time.perf_counter()
    for function in (readings, stated, quantity, wording, is_wording):
        function(text)
        function("5 " + text + "!")
    # Some tenths of a second; a pass per mark would take a minute.
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("text, want", [
    ("10 dollars", "10"), ("\\$10", "10"), ("$10", "10"), ("1 000", "1000"), ("1\\,000", "1000"),
    ("1,000", "1000"), ("-5", "-5"), ("1/2 cup", "1/2"), ("5\\text{ cm}^2", "5"), ("60 km/h", "60"),
    ("50%", "50\\%"), ("10\\%", "10\\%"), ("\\text{10 dollars}", "10"), ("30°", "30"),
    ("3x", None), ("12 or 13", None), ("5 sin x", None), ("2 sqrt(3)", None), ("10^{2}", None),
    ("5 apples and 3 oranges", None), ("", None), ("+", None), ("x", None), ("1e-3", None),
])
def test_quantities(text, want):
    assert quantity(text) == want


@pytest.mark.parametrize("text, want", [
    ("BADC", True), ("east", True), ("no", True), ("B, A, C", True), ("No solution", True),
    ("\\text{Evelyn}", True), ("$\\text{east}$", True), ("all real numbers", True),
    ("5 apples and 3 oranges", True), ("10:30 am", True),
    ("$BADC$", False), ("A", False), ("\\text{(A)}", False), ("2xy", False), ("xy+1", False),
    ("f(x)", False), ("sin x", False), ("x=3", False), ("(1,2)", False), ("12 or 13", False),
    ("3x+1", False), ("\\frac{1}{2}", False), ("pi", False), ("2 sqrt(3)", False), ("p/q", False),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", False), ("10 dollars", False), ("", False),
])
def test_words_or_mathematics(text, want):
    assert is_wording(text) == want
