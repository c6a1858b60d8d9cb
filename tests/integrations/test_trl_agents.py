"""RLSDTrainer over several turns: what the teacher reads and weighs, and hints after the fact."""

import asyncio

import pytest
import torch

pytest.importorskip("trl", reason="the TRL integration needs trl: pip install '.[trl]'")

from datasets import Dataset  # noqa: E402
from test_integrations_trl import one_sentence  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_agents import (  # noqa: E402
    OF_TOOL,
    PlainAgent,
    Quiet,
    Shop,
    look,
    make_agent,
    questions,
    run_agent,
    tokenizer_of,
)
from trl_runs import OFF, differences  # noqa: E402

from rlsd.config import DEFAULT_PRIVILEGED_TEMPLATE, UserError  # noqa: E402
from rlsd.integrations.trl import RLSDTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def rolled_out(prompts, trainer, **extra):
    """A rollout_func: six tokens or more, of which the third and fourth are an environment's."""
    prompt_ids = trainer._tokenize_prompts(prompts)[0]
    end = trainer._tokenizer.eos_token_id
    said = [[40 + i, 50, 60 + i, 70, *range(80, 81 + i % 3), end] for i in range(len(prompts))]
    return {"prompt_ids": prompt_ids, "completion_ids": said, "logprobs": None,
            "env_mask": [[1, 1, 0, 0, *[1] * (len(x) - 4)] for x in said], **extra}


def bare():
    """Questions without a column that the teacher could read."""
    return [{"prompt": row["prompt"]} for row in questions()]


def numbered():
    return [{**row, "answer": i} for i, row in enumerate(questions())]


def two_environments():
    return [{**row, "environment": ("shop", "quiet")[i % 2]} for i, row in enumerate(questions())]


def of_either(text):
    return ("buy", {"what": "tea"}) if "Buys a" in text else ("ring", {"times": 2})


AGENTS = {
    "tools": {"more": {"tools": [look]}, "arguments": {"where": "home"}},
    "environment": {"more": {"environment_factory": Shop}, "tool": "buy",
                    "arguments": {"what": "tea"}},
    "environments": {"more": {"environment_factory": {"shop": Shop, "quiet": Quiet},
                              "tools": [look]}, "tool": of_either, "data": two_environments()},
    "rollout_func": {"more": {"rollout_func": rolled_out}},
}


def assert_same_run(folder, reference, template, **options):
    theirs, want = run_agent(reference, folder, template, **options)
    ours, got = run_agent(RLSDTrainer, folder, template, **options)
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
    return ours


@pytest.mark.parametrize("options", AGENTS.values(), ids=AGENTS)
def test_lambda_zero_is_grpo_trainer(folder, options):
    assert_same_run(folder, GRPOTrainer, "qwen3", **options, **OFF)


@pytest.mark.parametrize("template, agent", [
    *(("qwen3", agent) for agent in AGENTS), ("llama3_1", "environment"),
    pytest.param("llama3_1", "tools", marks=pytest.mark.slow),
])
def test_rlsd_after_turns_is_hook_a_in_plain_pytorch(folder, template, agent):
    trainer = assert_same_run(
        folder, PlainAgent, template, rlsd_lambda_decay_steps=5, **AGENTS[agent]
    )
    if agent != "rollout_func":
        assert trainer.state.log_history[0]["tools/call_frequency"] > 0
        assert trainer.state.log_history[0]["tools/failure_frequency"] < 1
    assert trainer.state.log_history[0]["rlsd/hint_missing_frac"] == 0


def test_the_formula_of_trl_after_turns(folder):
    trainer = assert_same_run(
        folder, PlainAgent, "qwen3", rlsd_lambda_decay_steps=5, loss_type="sapo",
        **AGENTS["environment"],
    )
    assert trainer.obstacle


def rollout(trainer):
    """Of the first rollout what the loss gets, before TRL shuffles it."""
    kept, generate = [], trainer._generate_and_score_completions

    def noted(inputs):
        kept.append((inputs, generate(inputs)))
        return kept[-1][1]

    trainer._generate_and_score_completions = noted
    trainer.train()
    return kept[0]


def live(ids, mask):
    return [x[m.bool()].tolist() for x, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("agent", ["tools", "environment", "environments"])
@pytest.mark.parametrize("template", ["qwen3", "llama3_1"])
def test_which_tokens_the_teacher_reads(folder, template, agent):
    Shop.opened = 0
    options = AGENTS[agent]
    trainer, _ = make_agent(RLSDTrainer, folder, template, max_steps=1, **options)
    inputs, batch = rollout(trainer)
    tokenizer = tokenizer_of(template)
    student = live(batch["prompt_ids"], batch["prompt_mask"])
    teacher = live(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
    said = live(batch["completion_ids"], batch["completion_mask"])
    tool_mask = [m[: len(x)].tolist() for m, x in zip(batch["tool_mask"], said, strict=True)]
    for i, row in enumerate(inputs):
        asked, hint = row["prompt"][0]["content"], f"Known: {row['solution']}\n"
        own, hinted = tokenizer.decode(student[i]), tokenizer.decode(teacher[i])
        assert own.count(asked) == 1 and hinted == own.replace(asked, hint + asked)
        name = row.get("environment", agent)
        assert (" Shelf" in own) == (name in ("environment", "shop"))
        assert [tool in own for tool in ("Buys a", "Rings the", "Looks some")] == [
            name in ("environment", "shop"), name == "quiet", agent != "environment"
        ]
        answers = tokenizer.decode([x for x, m in zip(said[i], tool_mask[i], strict=True) if m])
        seen = tokenizer.decode([x for x, m in zip(said[i], tool_mask[i], strict=True) if not m])
        assert (OF_TOOL[template] in seen) == bool(i % 3) and OF_TOOL[template] not in answers
        assert answers.count("So it is") == 1 and "So it is" not in seen
    if agent != "tools":  # each sequence has an episode of its own
        assert len({tuple(x) for x in student if "Shelf" in tokenizer.decode(x)}) == Shop.opened


@pytest.mark.parametrize("template, agent", [
    ("qwen3", "environment"), ("llama3_1", "environment"), ("qwen3", "rollout_func"),
])
def test_an_empty_hint_gives_delta_zero(folder, template, agent, monkeypatch):
    monkeypatch.setattr("rlsd.tasks.prompts.insert_hint", lambda prompt, *_, **__: prompt)
    trainer, _ = make_agent(
        RLSDTrainer, folder, template, teacher_sync_steps=1, max_steps=2, **AGENTS[agent]
    )
    counted = []

    def noted(model, inputs, compute=trainer._compute_loss):
        counted.append((inputs["advantages"][:, None] != 0)
                       & (inputs["completion_mask"] * inputs["tool_mask"]).bool())
        return compute(model, inputs)

    trainer._compute_loss = noted
    trainer.train()
    for record, mask in zip(trainer.state.log_history, counted, strict=False):
        assert abs(record["rlsd/delta_mean"]) < 1e-6 and record["rlsd/delta_std"] < 1e-5
        assert mask.any()


def test_tool_tokens_have_no_part_in_metrics(folder):
    """Whatever a tool says, the means over tokens are those of what the model said."""
    found = []
    for noise in (0, 5):
        trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1, **AGENTS["rollout_func"])
        score = trainer._score

        def scored(*context, score=score, noise=noise):
            log_probs = score(*context).clone()
            log_probs[:, 2:4] += noise  # what the environment said
            return log_probs

        trainer._score = scored
        trainer.train()
        found.append({k: v for k, v in trainer.state.log_history[0].items()
                      if k.startswith(("rlsd/", "loss", "grad"))})
    assert found[0] == found[1] and found[0]["rlsd/delta_std"] > 0


def test_a_hint_as_a_turn_of_its_own(folder):
    """After the observation, which the repeated question has too; tools are listed once."""
    Shop.opened = 0
    trainer, _ = make_agent(
        RLSDTrainer, folder, "qwen3", max_steps=1, hint_placement="turn",
        privileged_template=DEFAULT_PRIVILEGED_TEMPLATE, **AGENTS["environment"],
    )
    inputs, batch = rollout(trainer)
    student = live(batch["prompt_ids"], batch["prompt_mask"])
    teacher = live(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
    for row, own, hinted in zip(inputs, student, teacher, strict=True):
        own, hinted = (trainer._tokenizer.decode(ids) for ids in (own, hinted))
        asked = own[own.index("<|im_start|>user") : own.rindex("<|im_start|>")]
        start = own[: own.index("<|im_start|>user")]
        assert "Shelf" in asked and "Buys a" in start
        assert hinted.startswith(start + asked) and hinted.endswith(own.removeprefix(start))
        between = hinted[len(start + asked) : -len(own.removeprefix(start))]
        assert between.startswith("<|im_start|>assistant") and row["solution"] in between


# rollout_func


def other_prompts(prompts, trainer, **extra):
    """Its own prompt_ids, of which TRL knows no messages."""
    out = rolled_out(prompts, trainer)
    out["prompt_ids"] = [[3, *ids] for ids in out["prompt_ids"]]
    return {**out, **extra}


def test_rollout_func_may_return_what_the_teacher_reads(folder):
    contexts = [None if i == 3 else [5, 6, 7 + i] for i in range(8)]

    def rollout_func(prompts, trainer):
        return other_prompts(prompts, trainer, teacher_prompt_ids=contexts)

    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1,
                            data=bare(), more={"rollout_func": rollout_func})
    _, batch = rollout(trainer)
    assert batch["has_hint"].tolist() == [i != 3 for i in range(8)]
    read = live(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
    assert [x for i, x in enumerate(read) if i != 3] == [x for x in contexts if x]
    assert trainer.state.log_history[0]["rlsd/hint_missing_frac"] == 1 / 8


@pytest.mark.parametrize("extra, hinted, complaint", [
    ({}, True, "^The prompt_ids that rollout_func returned .* return teacher_prompt_ids too"),
    ({}, False, "has no hint, and rollout_func returned no teacher_prompt_ids; return them"),
    ({"teacher_prompt_ids": [[5]] * 7}, True, "for each of the 8 sequences.* number 7 is \\(\\)"),
    ({"teacher_prompt_ids": [[]] * 8}, True, "number 0 is \\[\\]"),
    ({"teacher_prompt_ids": [[5, 10**6]] * 8}, True, "number 0 is \\[5, 1000000\\]"),
    ({"teacher_prompt_ids": "abc"}, True, "number 0 is 'abc'"),
], ids=["other", "no-hint", "short", "empty", "out-of-range", "text"])
def test_what_rollout_func_must_return(folder, extra, hinted, complaint):
    def rollout_func(prompts, trainer):
        return other_prompts(prompts, trainer, **extra)

    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1,
                            data=questions() if hinted else bare(),
                            more={"rollout_func": rollout_func})
    with pytest.raises(UserError, match=complaint) as error:
        trainer.train()
    one_sentence(error)


# Hindsight


def test_hint_func_sees_the_rollout_and_its_text_is_the_hint(folder):
    asked = []

    def hint_func(prompt, completion, feedback, **columns):
        asked.append((prompt, completion, feedback, columns))
        prompt.append("changed")
        return f"It went: {feedback}" if feedback else None

    agent = {**AGENTS["environment"], "data": numbered()}
    agent["more"] = {**agent["more"], "hint_func": hint_func}
    Shop.opened = 0
    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1, **agent)
    inputs, batch = rollout(trainer)
    tokenizer = tokenizer_of("qwen3")
    read = live(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
    assert len(asked) == len(inputs) == 8
    for i, (prompt, completion, feedback, columns) in enumerate(asked):
        row = inputs[i]
        assert prompt[0]["content"] == row["prompt"][0]["content"] + f" Shelf {i + 1}."
        assert [m["role"] for m in completion][:2] == (["assistant", "tool"] if i % 3
                                                       else ["assistant"])
        assert feedback == ("bought tea" if i % 3 else None)
        assert columns == {"solution": row["solution"], "answer": row["answer"]}
        assert bool(batch["has_hint"][i]) == bool(i % 3)
        assert ("Known: It went: bought tea\nWhat" in tokenizer.decode(read[i])) == bool(i % 3)
        assert "It is" not in tokenizer.decode(read[i])
    assert trainer.state.log_history[0]["rlsd/hint_missing_frac"] == 3 / 8


class HindsightAgent(PlainAgent):
    def hint(self, i, row):
        return f"bought tea {row['answer']}" if i % 3 else ""


@pytest.mark.parametrize("kind", [
    "function", "coroutine", pytest.param("object", marks=pytest.mark.slow),
])
def test_hindsight_is_hook_a_in_plain_pytorch(folder, kind):
    agent = {**AGENTS["environment"], "data": numbered()}

    def hint_func(prompt, completion, feedback, answer, **columns):
        return f"{feedback} {answer}" if feedback else " "

    async def later(prompt, completion, feedback, answer, **columns):
        await asyncio.sleep(0)
        return hint_func(prompt, completion, feedback, answer)

    class Asked:
        async def __call__(self, *given, **columns):
            return hint_func(*given, **columns)

    chosen = {"function": hint_func, "coroutine": later, "object": Asked()}[kind]
    # A teacher that is the student, to which no hint is delta 0: plain A.
    options = {"max_steps": 2, "rlsd_lambda_decay_steps": 5, "teacher_sync_steps": 1}
    _, want = run_agent(HindsightAgent, folder, "qwen3", **agent, **options)
    agent["more"] = {**agent["more"], "hint_func": chosen}
    trainer, got = run_agent(RLSDTrainer, folder, "qwen3", **agent, **options)
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)


def test_a_hint_that_would_end_or_start_a_turn_is_missing(folder):
    texts = ["fine", "<|im_end|>", None, "", " \n", "<|im_start|>assistant\n", "a <|endoftext|>",
             "ok"]
    count = iter(range(8))

    def hint_func(prompt, completion, feedback, **columns):
        return texts[next(count)]

    trainer, _ = make_agent(
        RLSDTrainer, folder, "qwen3", max_steps=1, data=bare(), more={"hint_func": hint_func},
    )
    _, batch = rollout(trainer)
    assert batch["has_hint"].tolist() == [True, *[False] * 6, True]
    assert trainer.state.log_history[0]["rlsd/hint_missing_frac"] == 6 / 8


def test_a_hint_that_writes_the_start_of_a_turn_in_plain_words_is_missing(folder):
    """Of a template without control tokens, where the teacher would read it as one."""
    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", more={"tools": [look]})
    trainer._tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    trainer.chat_template = None
    row = questions()[0]
    assert trainer._with_hint(row, row["prompt"], "ok")[0]["content"].startswith("Known: ok\n")
    assert trainer._with_hint(row, row["prompt"], "so [assistant] yes") is None


def test_feedback_of_a_rollout_func(folder):
    asked = []

    def rollout_func(prompts, trainer):
        return rolled_out(prompts, trainer, feedback=[f"note {i}" for i in range(len(prompts))])

    def hint_func(prompt, completion, feedback, **columns):
        asked.append(feedback)
        assert "feedback" not in columns
        return feedback

    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1, num_iterations=2,
                            more={"rollout_func": rollout_func, "hint_func": hint_func})
    trainer.train()
    assert asked == [f"note {i}" for i in range(8)]


def test_hint_func_is_asked_once_a_rollout_and_never_in_evaluation(folder):
    asked = []

    def hint_func(prompt, completion, feedback, **columns):
        asked.append(prompt)
        return "known"

    trainer, _ = make_agent(
        RLSDTrainer, folder, "qwen3", max_steps=4, num_iterations=2, rlsd_lambda_decay_steps=2,
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8,
        more={"hint_func": hint_func, "eval_dataset": Dataset.from_list(questions())},
    )
    trainer.train()
    assert len(asked) == 8  # lambda of the second rollout is 0
    assert any("eval_loss" in x for x in trainer.state.log_history)


@pytest.mark.parametrize("said, complaint", [
    (7, "^hint_func must return a text or None, but returned 7 for a completion of the prompt"),
    (["a"], r"returned \['a'\] for a completion"),
    (ValueError("no. such\nthing"), r"^hint_func failed for .* \(ValueError: no\)\.$"),
], ids=["number", "list", "exception"])
@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_a_hint_func_that_fails_is_one_sentence(folder, said, complaint, kind):
    def hint_func(prompt, completion, feedback, **columns):
        if isinstance(said, Exception):
            raise said
        return said

    async def later(*given, **columns):
        return hint_func(*given, **columns)

    chosen = hint_func if kind == "function" else later
    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1, more={"hint_func": chosen})
    with pytest.raises(UserError, match=complaint) as error:
        trainer.train()
    one_sentence(error)
    assert isinstance(error.value.__cause__, type(said)) or not isinstance(said, Exception)


# Refusals


class Method(Shop):
    def feedback(self) -> str:
        """Tells."""


def hint_func(prompt, completion, feedback, **columns):
    return "known"


@pytest.mark.parametrize("options, complaint", [
    ({"more": {"hint_func": "text"}}, "^hint_func must be a function, but is 'text'"),
    ({"more": {"hint_func": hint_func}, "data": [{**x, "feedback": "a"} for x in questions()]},
     "hint_func gets feedback from the rollout, but train_dataset has a column of that name"),
    ({"more": {"rollout_func": rolled_out},
      "data": [{**x, "teacher_prompt_ids": [1]} for x in questions()]},
     "rollout_func may return teacher_prompt_ids, but train_dataset has a column of that name"),
    ({"more": {"environment_factory": Method, "hint_func": hint_func}},
     "feedback is a method of the environment, which TRL offers to the model as a tool"),
    ({"more": {"environment_factory": Shop}, "data": bare()},
     "none of the columns .* add one, give a hint_func, or set rlsd_lambda to 0"),
    ({"more": {"environment_factory": {"shop": Shop}},
      "data": [{**x, "environment": "shed"} for x in questions()]},
     "has the environment 'shed', but environment_factory has shop"),
    ({"more": {"hint_func": hint_func}, "data": [*bare(), {
        "prompt": [{"role": "user", "content": "so<|im_end|>"}]}]},
     "^Row 4 of train_dataset cannot be used: its prompt spells the control token"),
    ({"more": {"hint_func": hint_func}, "hint_placement": "turn",
      "privileged_template": DEFAULT_PRIVILEGED_TEMPLATE, "data": [{"prompt": "Plain?"}] * 4},
     "^Row 0 of train_dataset cannot be used: its prompt is a plain text, in which hint_placement"),
], ids=["no-function", "feedback", "ids", "method", "no-hint", "no-environment", "prompt", "plain"])
def test_refused_at_construction(folder, options, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        make_agent(RLSDTrainer, folder, "qwen3", **options)
    one_sentence(error)


def test_a_teacher_prompt_lacks_what_an_environment_adds(folder):
    data = [{**x, "teacher_prompt": x["prompt"]} for x in questions()]
    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1,
                            **{**AGENTS["environment"], "data": data})
    with pytest.raises(UserError, match="a teacher_prompt, which lacks what its env") as error:
        trainer.train()
    one_sentence(error)


def test_teacher_prompt_ids_beside_a_hint_func(folder):
    def rollout_func(prompts, trainer):
        return rolled_out(prompts, trainer, teacher_prompt_ids=[[5]] * len(prompts))

    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1,
                            more={"rollout_func": rollout_func, "hint_func": hint_func})
    with pytest.raises(UserError, match="nothing would read the texts of hint_func") as error:
        trainer.train()
    one_sentence(error)


def test_an_environment_that_owns_the_data(folder):
    """No dataset at all: the prompt comes from reset, the hint from hint_func."""
    class Asking(Shop):
        def get_reward(self):
            return float(len(self.feedback or "") + Shop.opened % 2)

    trainer, _ = make_agent(RLSDTrainer, folder, "qwen3", max_steps=1, tool="buy", data=[],
                            arguments={"what": "tea"},
                            more={"environment_factory": Asking, "hint_func": hint_func})
    _, batch = rollout(trainer)
    read = live(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
    assert all("user\nKnown: known\n Shelf" in trainer._tokenizer.decode(x) for x in read)
