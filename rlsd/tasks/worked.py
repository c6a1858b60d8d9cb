"""Sums with worked solutions, for a small pretrained chat model: worked:add3, worked:seqadd.

Sized for SmolLM2-135M-Instruct: RL needs a task that the model gets right now and then. The
question stands after K solved ones as chat turns, and never is one of them. Solutions are
equations without words, so that there is little to say in another way.
"""

import random

from ..config import UserError

SYSTEM = "Solve the problem step by step. Write the final answer after ####."
TASKS = {  # name: (questions as tuples of numbers, solved turns unless said)
    "add3": ([(a, b, c) for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)], 2),
    "seqadd": ([(a, b) for a in range(1, 10) for b in range(2, 10)], 3),
}
MOST_TURNS = 8


def _exchange(task, numbers):
    """(question, worked solution, answer)"""
    if task == "add3":
        a, b, c = numbers
        question = f"Add these numbers step by step: {a}, {b}, {c}"
        steps = [(a, b), (a + b, c)]
    else:
        a, b = numbers
        question = f"Start with {a} and add {b} three times."
        steps = [(a, b), (a + b, b), (a + 2 * b, b)]
    lines = [f"{x} + {y} = {x + y}" for x, y in steps]
    answer = str(sum(steps[-1]))
    return question, "\n".join([*lines, f"#### {answer}"]), answer


def worked_rows(spec, size, seed):
    """Rows of worked:TASK or worked:TASK:TURNS, at most `size`, of different questions.

    seed: order, and with it which questions; the solved turns are always the same.
    """
    task, _, turns = spec.partition(":")
    if task not in TASKS:
        raise UserError(f"worked: knows the tasks {', '.join(TASKS)}, but not {task!r}.")
    space, most = list(TASKS[task][0]), MOST_TURNS
    turns = turns or str(TASKS[task][1])
    if not (turns.isascii() and turns.isdigit()) or int(turns) > most:
        raise UserError(
            f"worked:{task}: takes a number of solved turns from 0 to {most}, but got {turns!r}."
        )
    random.Random(task).shuffle(space)
    # The most that any number of turns would show stay out, so that it never changes the questions.
    shown, space = space[: int(turns)], space[most:]
    start = [{"role": "system", "content": SYSTEM}]
    for numbers in shown:
        question, solution, _ = _exchange(task, numbers)
        start += [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    random.Random(seed).shuffle(space)
    rows = []
    for i, numbers in enumerate(space[:size]):
        question, solution, answer = _exchange(task, numbers)
        rows.append({
            "prompt": [*start, {"role": "user", "content": question}], "solution": answer,
            "privileged_context": solution, "_source": f"{i} of worked:{spec}",
        })
    return rows
