"""Completions of several turns: which token ids, which mask, and where they end."""

import pytest
import torch

from rlsd import UserError
from rlsd.config import make_config
from rlsd.demo import character_tokenizer, tiny_model
from rlsd.demo_agent import agent_tokenizer
from rlsd.policy.distributed import Processes
from rlsd.sampling.agents import agent_of, require_tools
from rlsd.sampling.rollout import loss_mask, roll_out, rollout_metrics
from rlsd.sampling.samplers import Samples
from rlsd.tasks.data import tokenize_rows
from rlsd.tasks.tools import load_tools

HERE, VOCAB = __name__, 512


def lookup(key: str) -> str:
    """The key that a key links to.

    Args:
        key: The key.
    """
    return {"k3": "k7", "k7": "k9"}[key]


def halve(number: int) -> int:
    """Half of a number.

    Args:
        number: An even number.
    """
    return number // 2


class Place:
    """An environment that adds to the question, and is false as an empty list is."""

    def __len__(self):
        return 0

    def get_reward(self):
        return 2.0

    def reset(self, **columns):
        return " . k7"

    def go(self, key: str) -> str:
        """Go to a key.

        Args:
            key: The key.
        """
        self.feedback = f"went to {key}"
        return "k1"


def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def templated(name):
    """A tokenizer of characters with the chat template and control tokens of a model family."""
    from trl import chat_template_utils as known

    template, special = {
        "qwen3": (known.qwen3_chat_template, ["<|im_start|>", "<|im_end|>"]),
        "llama3.1": (known.llama3_1_chat_template, [
            "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        ]),
    }[name]
    tokenizer = character_tokenizer([chr(c) for c in range(32, 127)] + ["\n"])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def config(**changed):
    return make_config({
        "model_name_or_path": "m", "train_dataset": "d", "tools": [f"{HERE}.lookup"],
        "max_completion_length": 2000, "reward_funcs": [f"{HERE}.length"], "report_to": "none",
        "num_generations": 2, **changed,
    })


class Canned:
    """A sampler that says one text after the other; notes the prompts."""

    def __init__(self, tokenizer, *turns, ends=True):
        self.tokenizer, self.turns, self.ends, self.prompts = tokenizer, list(turns), ends, []

    def __call__(self, model, tokenizer, prompts, config, *, greedy=False, images=None):
        self.prompts.append(prompts)
        lists = [tokenizer(text, add_special_tokens=False)["input_ids"]
                 for text in self.turns.pop(0)]
        lists = [ids[: config.max_completion_length] for ids in lists]
        width = max(map(len, lists))
        ids, mask = torch.zeros(len(lists), width, dtype=torch.int64), torch.zeros(
            len(lists), width, dtype=torch.bool)
        for i, line in enumerate(lists):
            ids[i, : len(line)], mask[i, : len(line)] = torch.tensor(line), True
        cut = torch.tensor([line[-1] not in self.of_end() for line in lists])
        return Samples(ids, mask, cut, None if greedy else torch.where(mask, -0.5, 0.0))

    def of_end(self):
        return self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>", "<eos>"])


def rolled(tokenizer, sampler, run, rows=1):
    box = load_tools(run)
    agent = agent_of(run, tokenizer, box)
    chat = [{"role": "user", "content": "follow 4 from k3"}]
    given = [{"prompt": chat, "solution": "k9", "_source": "1 of x",
              "privileged_context": "k3 k7 k9"}] * rows
    given, _ = tokenize_rows(given, tokenizer, run, need_hint=True, toolbox=box)
    functions = [length, *agent.reward_funcs]
    rollout = roll_out(
        tiny_model(VOCAB, seed=0, positions=4096), tokenizer, given, run, functions,
        Processes(run), sample=sampler, agent=agent, hindsight=True,
    )
    return rollout, given, functions


CALLS = {
    "qwen3": (
        '<tool_call>\n{"name": "lookup", "arguments": {"key": "%s"}}\n</tool_call><|im_end|>',
        "\n<|im_start|>user\n<tool_response>\n%s\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n", "k9<|im_end|>",
    ),
    "llama3.1": (
        '{"name": "lookup", "parameters": {"key": "%s"}}<|eot_id|>',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"%s"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "k9<|eot_id|>",
    ),
}


@pytest.mark.parametrize("family", CALLS)
def test_alignment_of_ids_and_mask(family):
    """What was sampled stands as it was sampled; between it, what the template writes, masked."""
    tokenizer = templated(family)
    call, answer, last = CALLS[family]
    sampler = Canned(tokenizer, [call % "k3"], [call % "k7"], [last])
    rollout, (row,), _ = rolled(tokenizer, sampler, config())
    pieces = [call % "k3", answer % "k7", call % "k7", answer % "k9", last]
    ids = rollout.completion_ids[0][rollout.mask[0]].tolist()
    assert tokenizer.decode(ids) == "".join(pieces)
    want = [k % 2 == 0 for k, text in enumerate(pieces) for _ in tokenizer(text)["input_ids"]]
    assert rollout.tool_mask[0].tolist() == want == loss_mask(rollout, config())[0].tolist()
    assert sampler.prompts[1][0] == row["prompt_ids"] + ids[: len(sampler.prompts[1][0])
                                                          - len(row["prompt_ids"])]
    assert tokenizer.decode(sampler.prompts[2][0]) == tokenizer.decode(
        row["prompt_ids"]) + "".join(pieces[:4])
    shown = tokenizer.decode(row["prompt_ids"])
    assert "lookup" in shown and "The key that a key links to." in shown
    roles = [m["role"] for m in rollout.messages[0]]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert rollout.messages[0][0]["tool_calls"][0]["function"] == {
        "name": "lookup", "arguments": {"key": "k3"}
    }
    assert [m["content"] for m in rollout.messages[0] if m["role"] == "tool"] == ["k7", "k9"]
    assert rollout.messages[0][-1]["content"] == "k9"
    assert rollout.sampling_log_probs[0].tolist() == [-0.5 if w else 0.0 for w in want]
    assert not rollout.truncated.any() and rollout.calls.tolist() == [[2, 0]]
    assert "k9" in rollout.texts[0] and "tool_response" not in rollout.texts[0]


AGENT = agent_tokenizer()
CALL = '<call> {"name": "lookup", "arguments": {"key": "%s"}} </call> <eos>'


def plain(sampler, run=None, **more):
    return rolled(AGENT, sampler, run or config(), **more)


def test_lines_end_each_in_its_own_turn():
    run = config()
    sampler = Canned(AGENT, [CALL % "k3", "k9 <eos>", CALL % "k5"], ["k7 <eos>", "k2 <eos>"])
    rollout, _, functions = plain(sampler, run, rows=3)
    assert [len(p) for p in sampler.prompts] == [3, 2]
    assert [len(m) for m in rollout.messages] == [3, 1, 3]
    assert rollout.calls.tolist() == [[1, 0], [0, 0], [1, 1]]  # k5 links nowhere
    assert "error" in rollout.messages[2][1]["content"]
    metrics = rollout_metrics(rollout._replace(rewards=rollout.rewards[:2]), torch.ones(3), 2, run)
    assert metrics["tools/call_frequency"] == pytest.approx(2 / 3)
    assert metrics["tools/failure_frequency"] == 0.5
    assert metrics["completions/mean_length"] == pytest.approx((8 + 2 + 2 + 8 + 2) / 3)


@pytest.mark.parametrize("text, said", [
    ("<call> lookup k3 </call> <eos>", "a call is a JSON object with a name"),
    ('<call> {"name": "steal", "arguments": {}} </call> <eos>', "there is no tool"),
    ('<call> {"name": "lookup", "arguments": {"door": "k3"}} </call> <eos>', "unexpected keyword"),
    ('<call> {"name": "lookup", "arguments": "k3"} </call> <eos>', "must be an object"),
])
def test_a_call_that_is_wrong_is_answered_by_what_is_wrong(text, said):
    words = {word for word in text.split()}
    tokenizer = agent_tokenizer()
    tokenizer.add_tokens(sorted(words - set(tokenizer.get_vocab())))
    rollout, _, _ = rolled(tokenizer, Canned(tokenizer, [text], ["k9 <eos>"]), config())
    assert rollout.calls.tolist() == [[1, 1]]
    assert [m["role"] for m in rollout.messages[0]] == ["assistant", "tool", "assistant"]
    assert said in rollout.messages[0][1]["content"]


def test_arguments_have_the_types_of_the_tool():
    """A template whose calls are no JSON gives texts, which the tool's schema makes numbers."""
    known = pytest.importorskip("trl").chat_template_utils
    tokenizer = templated("qwen3")
    tokenizer.chat_template = known.qwen3_5_nothink_chat_template
    call = "<tool_call>\n<function=halve>\n<parameter=number>\n8\n</parameter>\n</function>\n"
    sampler = Canned(tokenizer, [f"{call}</tool_call><|im_end|>"], ["4<|im_end|>"])
    rollout, _, _ = rolled(tokenizer, sampler, config(tools=[f"{HERE}.halve"]))
    assert rollout.calls.tolist() == [[1, 0]] and rollout.messages[0][1]["content"] == "4"


def test_an_observation_must_leave_room(monkeypatch):
    monkeypatch.setattr(Place, "reset", lambda self, **columns: " . k7" * 40)
    run = config(tools=[], environment_factory=f"{HERE}.Place", max_completion_length=4040)
    with pytest.raises(UserError, match="Row 1 of x has a prompt of .* exceeds the 4096 positions"):
        rolled(agent_tokenizer(), Canned(AGENT), run)


def test_a_limit_of_turns_ends_an_endless_loop():
    sampler = Canned(AGENT, *[[CALL % "k3"]] * 3)
    rollout, _, _ = plain(sampler, config(max_tool_calling_iterations=2))
    assert rollout.calls.tolist() == [[2, 0]] and not rollout.truncated.any()
    assert [m["role"] for m in rollout.messages[0]] == ["assistant", "tool"] * 2 + ["assistant"]


def test_the_length_ends_an_endless_loop():
    """An answer without room, and a turn that is cut, end the line as truncated."""
    for most in range(9, 30):
        sampler = Canned(AGENT, *[[CALL % "k3"]] * 9)
        rollout, _, _ = plain(sampler, config(max_completion_length=most))
        assert rollout.mask.sum() <= most and rollout.truncated.tolist() == [True]
        run = config(max_completion_length=most, mask_truncated_completions=True)
        assert not loss_mask(rollout, run).any()


def test_a_cut_turn_calls_nothing():
    rollout, _, _ = plain(Canned(AGENT, [(CALL % "k3").removesuffix(" <eos>")]))
    assert rollout.calls.tolist() == [[0, 0]] and rollout.truncated.tolist() == [True]


def test_an_environment_adds_to_the_question_of_both_contexts():
    run = config(tools=[], environment_factory=f"{HERE}.Place", privileged_template=
                 "path {privileged_context} . {prompt}")
    tokenizer = agent_tokenizer()
    call = '<call> {"name": "go", "arguments": {"key": "k3"}} </call> <eos>'
    tokenizer.add_tokens(['"go",'])
    rollout, (row,), _ = rolled(tokenizer, Canned(tokenizer, [call], ["k1 <eos>"]), run)
    student, teacher = (
        tokenizer.decode(rollout.rows[0][name]) for name in ("prompt_ids", "teacher_prompt_ids")
    )
    assert student == "<user> follow 4 from k3 . k7 <eos> <assistant>"
    assert teacher == "<user> path k3 k7 k9 . follow 4 from k3 . k7 <eos> <assistant>"
    assert row["prompt"][0]["content"] == "follow 4 from k3"
    assert rollout.rewards_per_func[0, 1] == 2.0


def from_feedback(prompt, completion, feedback, **columns):
    return feedback


def test_hindsight_reads_the_environment():
    run = config(tools=[], environment_factory=f"{HERE}.Place", hint_func=f"{HERE}.from_feedback")
    tokenizer = agent_tokenizer()
    tokenizer.add_tokens(['"go",', "went", "to", "Reference", "solution:"])
    call = '<call> {"name": "go", "arguments": {"key": "%s"}} </call> <eos>'
    sampler = Canned(tokenizer, [call % "k3", call % "k4"], ["k1 <eos>", "k1 <eos>"])
    rollout, _, _ = rolled(tokenizer, sampler, run, rows=2)
    shown = [tokenizer.decode(row["teacher_prompt_ids"]) for row in rollout.rows]
    assert ["went to k3" in text for text in shown] == [True, False]
    assert ["went to k4" in text for text in shown] == [False, True]


def test_no_hint_is_counted():
    run = config(hint_func=f"{HERE}.from_feedback")
    rollout, _, _ = plain(Canned(AGENT, ["k9 <eos>", "k9 <eos>"]), run, rows=2)
    assert [row["teacher_prompt_ids"] for row in rollout.rows] == [None, None]
    assert rollout_metrics(rollout, torch.ones(2), 2, run)["rlsd/hint_missing_frac"] == 1.0


def test_templates_without_tools_are_refused():
    bare = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    tokenizer = agent_tokenizer()
    tokenizer.chat_template = bare
    with pytest.raises(UserError, match="cannot show calls of tools and their answers"):
        require_tools(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="cannot show calls of tools"):
        require_tools(tokenizer)


def test_a_template_that_nobody_can_parse_is_refused():
    tokenizer = agent_tokenizer()
    tokenizer.response_template = None
    with pytest.raises(UserError, match="The tokenizer has no response_template"):
        require_tools(tokenizer)


def test_a_plain_text_is_refused():
    run = config()
    rows = [{"prompt": "text", "privileged_context": "x", "_source": "1 of x"}]
    with pytest.raises(UserError, match="Row 1 of x .* plain text, but tools need a"):
        tokenize_rows(rows, AGENT, run, need_hint=True, toolbox=load_tools(run))


def own_rollout(prompts, trainer):
    ids = AGENT("<user> follow 4 from k3 <eos> <assistant>")["input_ids"]
    return trainer.wrap({
        "prompt_ids": [ids for _ in prompts], "completion_ids": [[5, 6, 7, 1]] * len(prompts),
        "env_mask": [[1, 0, 1, 1]] * len(prompts), "logprobs": [[-1.0, 0.0, -2.0, -3.0]] * len(
            prompts), "score": [3] * len(prompts),
    })


class Wrapper:
    """Stands for the trainer, and for what a rollout_func may return otherwise."""

    def __init__(self, **changed):
        self.changed = changed

    def wrap(self, found):
        if "wrong" in self.changed:
            self.changed["wrong"]()
        return {k: v for k, v in (found | self.changed).items() if v is not None}


def by_function(**changed):
    run = config(tools=[], rollout_func=f"{HERE}.own_rollout")
    rows = [{"prompt": [{"role": "user", "content": "follow 4 from k3"}], "solution": "k9",
             "privileged_context": "k3 k7 k9", "_source": "1 of x"}]
    rows, _ = tokenize_rows(rows, AGENT, run, need_hint=True)
    agent = agent_of(run, AGENT, None, Wrapper(**changed))
    return roll_out(
        tiny_model(VOCAB, seed=0), AGENT, rows, run, [scored], Processes(run), agent=agent
    )


def test_a_rollout_func_that_raises_is_a_sentence():
    with pytest.raises(UserError, match="rollout_func raised TypeError: 'int' object is not"):
        by_function(wrong=7)


def scored(prompts, completions, completion_ids, score, **columns):
    return [float(s) for s in score]


def test_rollout_func():
    rollout = by_function()
    assert rollout.completion_ids.tolist() == [[5, 6, 7, 1]]
    assert rollout.tool_mask.tolist() == [[True, False, True, True]]
    assert rollout.sampling_log_probs.tolist() == [[-1.0, 0.0, -2.0, -3.0]]
    assert rollout.rewards.tolist() == [3.0] and not rollout.truncated.any()
    assert rollout.calls is None
    assert rollout.rows[0]["teacher_prompt_ids"] is not None
    bare = by_function(env_mask=None, logprobs=None, completion_ids=[[5, 6]])
    assert bare.tool_mask.all() and bare.sampling_log_probs.isnan().all() and bare.truncated.all()


def test_rollout_func_may_give_the_teacher_its_prompt():
    assert by_function(prompt_ids=[[4, 5]], teacher_prompt_ids=[[6, 4, 5]]).rows[0][
        "teacher_prompt_ids"] == [6, 4, 5]


@pytest.mark.parametrize("changed, sentence", [
    ({"completion_ids": [[5, None, 7, 1]]}, "returned for row 1 of x what are no lists of numbers"),
    ({"teacher_prompt_ids": [["x"]]}, "returned for row 1 of x what are no lists of numbers"),
    ({"prompt_ids": [7]}, "returned for row 1 of x what are no lists of numbers"),
    ({"completion_ids": None}, "must return a mapping with prompt_ids and completion_ids"),
    ({"completion_ids": [[5], [6]]}, "must return lists of 1 values, one per prompt, but compl"),
    ({"completion_ids": [[]]}, "an empty list or an id outside of the model's 512"),
    ({"completion_ids": [[5, 512, 6, 7]]}, "an empty list or an id outside"),
    ({"env_mask": [[1]]}, "returned 4 completion_ids for row 1 of x, but 1 values of env_mask"),
    ({"logprobs": [[0.0]]}, "returned 4 completion_ids for row 1 of x, but 4 values of env_mask "
                            "and 1 logprobs"),
    ({"prompt_ids": [[4, 5]]}, "used another prompt for row 1 of x than the row's"),
])
def test_a_rollout_func_that_is_wrong_is_a_sentence(changed, sentence):
    with pytest.raises(UserError, match=sentence):
        by_function(**changed)
