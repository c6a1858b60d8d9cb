"""The loop to copy: its length and imports, one step against plain PyTorch, and that it learns.

examples/trl_rlsd.py runs in tests/integrations, examples/compare.yaml in test_compare.py.
"""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from rlsd import group_advantages, rlsd_lambda_at

PATH = Path(__file__).parents[1] / "examples" / "minimal_loop.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("minimal_loop", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_loop_is_short_and_stands_alone():
    source = PATH.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    nodes = list(ast.walk(ast.parse(source)))
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    assert {m.split(".")[0] for m in modules} == {
        "copy", "random", "torch", "transformers", "rlsd_kernels"
    }


def naive_log_probs(model, prompt, tokens):
    """(t,) of one sequence alone: no padding, no shift but the one written here."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    return logits[rows].log_softmax(-1)[range(len(tokens)), tokens]


def naive_loss(model, teacher, rows, advantages, lam, eps_w=0.2):
    """The token mean of -A_hat on an on-policy step: ratio 1, with its gradient."""
    total, count = 0.0, 0
    for (prompt, teacher_prompt, tokens), a in zip(rows, advantages.tolist(), strict=True):
        log_p = naive_log_probs(model, prompt, tokens)
        log_t = naive_log_probs(teacher, teacher_prompt, tokens).detach()
        sign = (a > 0) - (a < 0)
        w = (sign * (log_t - log_p.detach())).exp().clamp(1 - eps_w, 1 + eps_w)
        total = total - (a * (1 - lam + lam * w) * (log_p - log_p.detach()).exp()).sum()
        count += len(tokens)
    return total / count


@pytest.fixture
def scripted(example, one_thread, monkeypatch):
    """The loop with 3 groups of 4 known completions: (problems, students), filled as it runs.

    Right, cut off, wrong, short and right; the first group is all right.
    """
    problems, students, make_problem = [], [], example.make_problem

    def seen_problem(**keywords):
        problems.append(make_problem(**keywords))
        return problems[-1]

    def generate(model, ids, **keywords):
        students.append(model)
        rows = [answer(example, k, problems[k // 4 - 3][2]) for k in range(len(ids))]
        length = example.MAX_COMPLETION_LENGTH
        padded = [row + [example.PAD] * (length - len(row)) for row in rows]
        return torch.cat([ids, torch.tensor(padded)], 1)

    monkeypatch.setattr(example, "NUM_QUESTIONS", 3)
    monkeypatch.setattr(example, "NUM_GENERATIONS", 4)
    monkeypatch.setattr(example, "make_problem", seen_problem)
    monkeypatch.setattr(example.Qwen3ForCausalLM, "generate", generate)
    return problems, students


REWARDS = [1.0] * 4 + [1.0, 0, 0, 1] * 2


def answer(example, k, solution):
    """Completion k of the scripted twelve."""
    length = example.MAX_COMPLETION_LENGTH
    right, cut_off = [*solution, example.EOS], [*solution, *[0] * length][:length]
    wrong = [*solution[:-1], (solution[-1] + 1) % 7, example.EOS]
    return right if k < 4 else [right, cut_off, wrong, right[-2:]][k % 4]


def test_one_step_is_plain_pytorch(example, scripted, monkeypatch):
    problems, students = scripted
    fused, steps = example.fused_linear_rlsd_loss, []

    def seen_loss(hidden, weight, completion_ids, advantages, **keywords):
        out = fused(hidden, weight, completion_ids, advantages, **keywords)
        torch.testing.assert_close(advantages, group_advantages(REWARDS, 4).double())
        rows = [(*problems[k // 4 - 3][:2], answer(example, k, problems[k // 4 - 3][2]))
                for k in range(12)]
        student, lam = students[-1], keywords["rlsd_lambda"]
        plain = naive_loss(student, student, rows, advantages, lam)  # the snapshot is fresh
        parameters = list(student.parameters())
        got = torch.autograd.grad(out.loss, parameters, retain_graph=True)
        steps.append((out.loss, plain, got, torch.autograd.grad(plain, parameters), lam))
        return out

    monkeypatch.setattr(example, "RLSD_LAMBDA", 1.0)
    monkeypatch.setattr(example, "fused_linear_rlsd_loss", seen_loss)
    accuracy = example.main(warm_up_steps=2, max_steps=1)
    ((loss, plain, got, wanted, lam),) = steps
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    assert accuracy == [8 / 12] and lam == rlsd_lambda_at(1, 1.0, 0, example.DECAY_STEPS)
    assert all(hinted == [example.HINT, *s, *prompt] for prompt, hinted, s in problems)
    assert len({len(solution) for *_, solution in problems[-3:]}) > 1  # teacher rows of two lengths


def test_the_teacher_is_a_snapshot_and_goes_with_lambda(example, scripted, monkeypatch):
    fused, heads = example.fused_linear_rlsd_loss, []

    def seen_loss(hidden, weight, *inputs, teacher_weight=None, teacher_hidden=None, **keywords):
        heads.append((weight.detach().clone(), teacher_weight))
        if teacher_weight is not None:
            heads[-1] = (heads[-1][0], teacher_weight.clone())
            keywords |= {"teacher_weight": teacher_weight, "teacher_hidden": teacher_hidden}
            assert not teacher_hidden.requires_grad and not teacher_weight.requires_grad
        return fused(hidden, weight, *inputs, **keywords)

    monkeypatch.setattr(example, "TEACHER_SYNC_STEPS", 2)
    monkeypatch.setattr(example, "DECAY_STEPS", 4)
    monkeypatch.setattr(example, "fused_linear_rlsd_loss", seen_loss)
    example.main(warm_up_steps=2, max_steps=4)
    students, teachers = zip(*heads, strict=True)
    assert teachers[3] is None  # lambda is 0
    assert torch.equal(teachers[0], students[0]) and torch.equal(teachers[1], students[0])
    assert torch.equal(teachers[2], students[2]) and not torch.equal(students[2], students[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_it_learns_what_it_prints(example, one_thread, seed):
    accuracy = example.main(seed=seed)
    assert sum(accuracy[:2]) / 2 < 0.5 and sum(accuracy[-10:]) / 10 > 0.75
