import copy

import pytest
import torch

from rlsd.config import TEACHER_MODEL_KINDS
from rlsd.demo import tiny_model
from rlsd.policy.teacher import Teacher, copy_weights, frozen_copy


def model(seed=0, dtype=torch.float32):
    made = tiny_model(20, seed=seed, hidden=16, layers=1).to(dtype)
    made.register_buffer("steps_seen", torch.zeros(2))
    return made


def move(student, by=1e-2):
    """One change of every parameter and buffer, as an optimizer step would make."""
    with torch.no_grad():
        for tensor in (*student.parameters(), student.steps_seen):
            tensor.add_(by * torch.randn(tensor.shape).to(tensor.dtype))


def weights(module):
    return {k: v.detach().clone() for k, v in (*module.named_parameters(), *module.named_buffers())}


def differing(a, b):
    """Names of the tensors that are not bitwise equal."""
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def moving(names):
    return {name for name in names if "rotary" not in name}


@pytest.mark.parametrize("every", [1, 3, 10])
def test_snapshot_syncs_all_weights_exactly_every_n_steps(every):
    student = model()
    teacher = Teacher(student, "snapshot", sync_steps=every)
    frozen = weights(teacher.model)
    for step in range(1, 2 * every + 2):
        # At s = kN + 1 the rollout is scored by the student's very weights.
        if step % every == 1 % every:
            assert differing(weights(teacher.model), weights(student)) == set()
        move(student)
        teacher.after_step(step)
        if step % every == 0:
            frozen = weights(student)
        assert differing(weights(teacher.model), frozen) == set()
        if step % every:
            # Embeddings, final norm and every layer: all differ until the sync brings all back.
            assert differing(frozen, weights(student)) == moving(frozen)


def test_snapshot_covers_embedding_norm_and_head():
    names = moving(weights(model()))
    for part in ("embed_tokens", "model.norm", "q_proj", "down_proj", "steps_seen"):
        assert any(part in name for name in names), part


@pytest.mark.parametrize("kind", [k for k in TEACHER_MODEL_KINDS if k != "live"])
def test_tied_embeddings_stay_tied(kind):
    student = model()
    teacher = Teacher(student, kind, sync_steps=1)
    for step in (1, 2):
        move(student)
        teacher.after_step(step)
    head, embedding = (
        teacher.model.get_output_embeddings(), teacher.model.get_input_embeddings()
    )
    assert head.weight is embedding.weight
    assert head.weight is not student.get_input_embeddings().weight


def test_untied_heads_follow_too():
    student = model()
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
    teacher = Teacher(student, "snapshot", sync_steps=2)
    move(student)
    teacher.after_step(2)
    assert torch.equal(teacher.model.lm_head.weight, student.lm_head.weight)
    assert not torch.equal(teacher.model.lm_head.weight, teacher.model.model.embed_tokens.weight)


def test_base_never_changes():
    student = model()
    teacher, start = Teacher(student, "base", sync_steps=1), weights(student)
    for step in range(1, 5):
        move(student)
        teacher.after_step(step)
    assert differing(weights(teacher.model), start) == set()
    assert differing(weights(student), start) == moving(start)


def test_live_is_the_student():
    student = model()
    teacher = Teacher(student, "live")
    move(student)
    teacher.after_step(1)
    assert teacher.model is student and teacher.state_dict() == {}
    assert all(p.requires_grad for p in student.parameters())


def test_ema_is_the_textbook_mean():
    student = model()
    teacher = Teacher(student, "ema", ema_rate=0.3)
    mean = {name: p.detach().double() for name, p in student.named_parameters()}
    for step in range(1, 6):
        move(student)
        teacher.after_step(step)
        for name, p in student.named_parameters():
            mean[name] = 0.7 * mean[name] + 0.3 * p.detach().double()
    for name, p in teacher.model.named_parameters():
        assert torch.allclose(p.double(), mean[name], atol=1e-6), name


def test_ema_of_a_bf16_student_does_not_stall():
    student = model(dtype=torch.bfloat16)
    with torch.no_grad():
        for p in student.parameters():
            p.fill_(0.125)
    teacher, naive = Teacher(student, "ema", ema_rate=0.05), copy.deepcopy(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(2**-10)  # 1e-3, one unit in the last place of bf16 at 0.125
    for step in range(1, 201):
        teacher.after_step(step)
        with torch.no_grad():
            for p, new in zip(naive.parameters(), student.parameters(), strict=True):
                p.lerp_(new, 0.05)
    for mean, own in zip(teacher.mean, teacher.model.parameters(), strict=True):
        assert mean.dtype == torch.float32 and own.dtype == torch.bfloat16
        assert torch.allclose(mean, torch.tensor(0.125 + 2**-10), atol=1e-6)
        assert (own == 0.125 + 2**-10).all()
    for p in naive.parameters():
        assert (p == 0.125).all()  # the trap: a bf16 mean has not moved in 200 steps


@pytest.mark.parametrize("kind", TEACHER_MODEL_KINDS)
def test_no_gradient_reaches_the_teachers_copy(kind):
    student = model()
    teacher = Teacher(student, kind)
    if kind != "live":
        assert not any(p.requires_grad for p in teacher.model.parameters())
        assert not teacher.model.training
    student.train()
    teacher.after_step(10)
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert student.training


@pytest.mark.parametrize("kind", TEACHER_MODEL_KINDS)
def test_state_round_trip_through_a_file(kind, tmp_path):
    def run(teacher, student, steps):
        for step in steps:
            torch.manual_seed(step)
            move(student)
            teacher.after_step(step)

    student = model()
    teacher = Teacher(student, kind, sync_steps=3, ema_rate=0.1)
    run(teacher, student, range(1, 5))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    # A resumed run builds the teacher from the checkpoint's student, not from the start's.
    resumed = copy.deepcopy(student)
    again = Teacher(resumed, kind, sync_steps=3, ema_rate=0.1)
    again.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    assert differing(weights(again.model), weights(teacher.model)) == set()
    run(teacher, student, range(5, 8))
    run(again, resumed, range(5, 8))
    assert differing(weights(again.model), weights(teacher.model)) == set()
    if kind in ("base", "ema"):
        assert differing(weights(again.model), weights(resumed)) != set()


@pytest.mark.parametrize("kind", ["base", "snapshot", "ema"])
def test_loading_is_strict(kind):
    state = Teacher(model(), kind).state_dict()
    broken = {**state["model"]}
    del broken["model.norm.weight"]
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        Teacher(model(seed=1), kind).load_state_dict({**state, "model": broken})


def test_copy_weights_is_a_copy():
    a, b = model(), model(seed=1)
    assert differing(weights(a), weights(b))
    copy_weights(a, b)
    assert differing(weights(a), weights(b)) == set()
    move(a)
    assert differing(weights(a), weights(b)) == moving(weights(a))


def test_frozen_copy_shares_nothing_and_leaves_the_model():
    student = model().train()
    copied = frozen_copy(student)
    move(student)
    assert differing(weights(copied), weights(student)) == moving(weights(student))
    assert student.training and not copied.training
