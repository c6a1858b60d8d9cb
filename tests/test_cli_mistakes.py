"""One sentence for every mistake in a config, an option, the data, a reward or a folder."""

import json
import time

import pytest
from runs import (
    clean_logging,  # noqa: F401
    fails,
    make_trainer,
    problems,
    quick,  # noqa: F401
    write_config,
    write_rows,
)

import rlsd.trainer
from rlsd.cli import main


def train_fails(capsys, folder, **changed):
    return fails(capsys, "train", "--config", write_config(folder, **changed))


def test_missing_config_file(capsys):
    message = fails(capsys, "train", "--config", "nowhere/x.yaml")
    assert message == "rlsd: Cannot read the config nowhere/x.yaml: No such file or directory."


@pytest.mark.parametrize(
    "text, words",
    [
        ("seed: 1\nbeta: [0.1\n", "is not valid YAML at line 3"),
        ("a: b: c\n", "is not valid YAML at line 1"),
        ("seed: 1\n\tbeta: 2\n", "is not valid YAML at line 2"),
        ("just words\n", "must be a list of `option: value` lines"),
        ("- 1\n", "must be a list of `option: value` lines"),
        ("learning_rate: 1.0e-5\nseed: 1\nlearning_rate: 2.0e-5\n", "gives learning_rate twice"),
        ("chat_template_kwargs: {a: 1, b: 2, a: 3}\n", "gives a twice"),
    ],
    ids=["open-bracket", "two-colons", "tab", "words", "list", "twice", "twice-inside"],
)
def test_malformed_config(text, words, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert fails(capsys, "train", "--config", path) == f"rlsd: The config {path} {words}."


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--learning_rat", "1"], "Unknown option 'learning_rat'; did you mean learning_rate?"),
        (["--num_generation", "4"], "did you mean num_generations?"),
        (["--zzzz", "4"], "Unknown option 'zzzz'; see `rlsd train --help`."),
        (["--objective", "ppo"], "objective must be one of rlsd, rlcsd, grpo, opsd"),
        (["--max_steps", "many"], "max_steps must be a whole number, but got 'many'."),
        (["--max_steps", "1.5"], "max_steps must be a whole number, but got 1.5."),
        (["--learning_rate", "fast"], "learning_rate must be a number, but got 'fast'."),
        (["--rlsd_lambda", "2"], "rlsd_lambda must be a finite number in [0, 1], but got 2.0."),
        (["--num_generations", "1"], "num_generations must be at least 2, but got 1."),
        (["--num_generations", "3"], "generation_batch_size (16) must be a multiple of"),
        (["--rlsd_negative_only", "perhaps"], "rlsd_negative_only must be true or false"),
        (["--reward_weights", "[1, 2]"], "reward_weights has 2 entries but reward_funcs has 1"),
        (["--privileged_template", "{prompt}"], "privileged_template must contain"),
        (["--privileged_template", "Hint: {prompt}"], "{privileged_context} exactly once"),
        (["--seed"], "--seed needs a value."),
        (["--seed", "--beta", "1"], "--seed needs a value."),
        (["--seed", "1", "--seed=2"], "--seed is given twice."),
        (["seed", "1"], "Expected an option that starts with --, but got 'seed'."),
    ],
    ids=lambda value: "_".join(value).replace("-", "") if isinstance(value, list) else "",
)
def test_bad_option(arguments, words, tmp_path, capsys):
    assert words.rstrip(".") in fails(
        capsys, "train", "--config", write_config(tmp_path), *arguments
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], "Unknown command 'trian'"),
        (["--config", "x.yaml"], "Unknown command '--config'"),
        (["train", "--objective", "grpo"], "model_name_or_path is not set"),
        (["train", "--max_steps", "0"], "--max_steps must be a whole number of at least 1"),
        (["train", "--seed", "x"], "--seed must be a whole number of at least 0, but got x"),
        (["eval"], "rlsd eval RUN"),
        (["eval", "--seed", "1"], "rlsd eval RUN"),
        (["eval", "nowhere"], "There is no run folder or checkpoint nowhere"),
        (["plot"], "Usage: rlsd plot RUN"),
        (["plot", "nowhere"], "nowhere is not a run folder"),
        (["plot", "nowhere", "--colour", "red"], "Usage: rlsd plot RUN"),
        (["validate", "fast"], "rlsd validate takes no arguments, but got fast"),
        (["bench", "--columns", "7"], "rlsd bench has no option --columns"),
        (["bench", "--rows", "9" * 30], "--rows must be less than 2147483648"),
        (["bench", "--rows", "2000000000", "--vocab_size", "2000000000"], "Out of memory while"),
        (["train", "--seed", "9" * 30], "--seed must be at most 2147483648"),
        (["doctor", "--verbose", "1"], "rlsd doctor takes no arguments, but got --verbose 1"),
        (["train", "--resume_from_checkpoint", "nowhere"], "There is no run folder"),
        (["train", "--resume_from_checkpoint", "2024"], "There is no run folder"),
        (["plot", ".", "--output", "7"], "not a run folder"),
    ],
    ids=lambda value: "_".join(value).replace("-", "") if isinstance(value, list) else "",
)
def test_bad_command(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_missing_dataset_file(name, tmp_path, capsys):
    message = train_fails(capsys, tmp_path, train_dataset=str(tmp_path / name))
    assert str(tmp_path / name) in message


def broken(index, **columns):
    """The text of twelve good rows with row `index` changed (1-based)."""
    rows = problems(12)
    rows[index - 1] = {k: v for k, v in (rows[index - 1] | columns).items() if v is not ...}
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text, words",
    [
        (broken(3).replace("}\n", "\n", 1), "line 1 of {} is not valid JSON"),
        (broken(3) + "{'prompt': 1}\n", "line 13 of {} is not valid JSON"),
        (broken(3) + "[1, 2]\n", "line 13 of {} must be a JSON object"),
        (broken(3, prompt=...), "line 3 of {} has no prompt"),
        (broken(3, prompt=""), "line 3 of {} has no prompt"),
        (broken(3, prompt=7), "line 3 of {}: prompt must be a text or a list of messages"),
        (broken(4, solution=...), "line 4 of {} has no solution"),
        (broken(5, privileged_context=" "), "line 5 of {} has no privileged context"),
        (broken(5, privileged_context=3), "line 5 of {}: privileged_context must be a text"),
        (broken(6, prompt=[{"role": "user", "content": "x"}]), "no chat template"),
        ("", "{} has no rows"),
        (broken(1).replace("\n", "", 1), "line 1 of {} is not valid JSON"),
    ],
    ids=["no-brace", "python-dict", "list", "no-prompt", "empty-prompt", "number-prompt",
         "no-solution", "empty-privileged", "number-privileged", "chat-without-template",
         "empty-file", "two-rows-in-a-line"],
)
def test_bad_row_is_named(text, words, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    assert words.format(path) in train_fails(capsys, tmp_path)
    assert not (tmp_path / "run").exists()


def test_too_few_rows_to_hold_out(tmp_path, capsys):
    assert "too few to hold out eval_size = 12" in train_fails(capsys, tmp_path, eval_size=12)


@pytest.mark.parametrize(
    "limits", [{"max_prompt_length": 3}, {"max_teacher_prompt_length": 5}], ids=["own", "teacher"]
)
def test_all_prompts_over_long(limits, tmp_path, capsys):
    message = train_fails(capsys, tmp_path, **limits)
    assert "of 8 rows as over-long" in message and "line 1 of" in message, message
    assert f"limit {[*limits.values()][0]}" in message


def test_some_prompts_over_long_are_dropped_and_counted(tmp_path, capsys):
    lengths = [len(row["prompt"].split()) for row in problems(12)[:8]]
    kept = sum(n <= 7 for n in lengths)
    assert 0 < kept < 8
    config = write_config(tmp_path, max_prompt_length=7, generation_batch_size=8)
    assert main(["train", "--config", config]) == 0
    out = capsys.readouterr().out
    first = next(i for i, n in enumerate(lengths, 1) if n > 7)
    assert f"Dropped {8 - kept} of 8 rows as over-long; first: row line {first} of" in out
    assert f"rlsd: {kept} training questions" in out and "step 2/2" in out


def raising(completions, **columns):
    raise ZeroDivisionError("division by zero")


def short(completions, **columns):
    return [1.0]


def not_a_list(completions, **columns):
    return 1.0


def with_nan(completions, **columns):
    return [float("nan")] * len(completions)


def with_none(completions, **columns):
    return [None] * len(completions)


def hanging(completions, **columns):
    time.sleep(600)


@pytest.mark.parametrize(
    "name, words",
    [
        ("exact_macth", "Unknown reward function 'exact_macth'; built in are exact_match,"),
        ("no_module.reward", "Cannot import the reward function 'no_module.reward'"),
        ("rlsd.demo.nothing", "Cannot import the reward function 'rlsd.demo.nothing'"),
        ("rlsd.demo.MARKER", "The reward function 'rlsd.demo.MARKER' is not callable"),
        ("test_cli_mistakes.raising", "raising raised ZeroDivisionError: division by zero"),
        ("test_cli_mistakes.short",
         "short must return a list of 16 numbers, one per completion, but"),
        ("test_cli_mistakes.not_a_list", "not_a_list must return a list of 16 numbers"),
        ("test_cli_mistakes.with_nan", "with_nan returned nan for row line"),
        ("test_cli_mistakes.with_none", "returned None for row line"),
    ],
)
def test_bad_reward_function(name, words, tmp_path, capsys):
    assert words in train_fails(capsys, tmp_path, reward_funcs=[name])


def test_hanging_reward_function(tmp_path, capsys):
    message = train_fails(
        capsys, tmp_path, reward_funcs=["test_cli_mistakes.hanging"], reward_timeout=0.5
    )
    assert "hanging did not return within reward_timeout = 0.5 seconds on 16 comp" in message
    assert "row line" in message and "and 3 others" in message


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_bad_model_folder(kind, tmp_path, capsys):
    path = tmp_path / "no_model"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("not a model")
    assert f"Cannot load the model '{path}'" in train_fails(
        capsys, tmp_path, model_name_or_path=str(path)
    )


def test_bad_device(tmp_path, capsys):
    assert "Cannot use device 'abacus'" in train_fails(capsys, tmp_path, device="abacus")


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_unavailable_impl_stops_before_the_first_rollout(impl, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rlsd.trainer, "roll_out", lambda *_: pytest.fail("sampled"))
    assert f"impl='{impl}' cannot run: " in train_fails(capsys, tmp_path, impl=impl)
    assert not (tmp_path / "run").exists()


def test_existing_run_folder(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    message = train_fails(capsys, tmp_path)
    assert f"The run folder {tmp_path}/run already exists" in message
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("output_dir", ["train.jsonl", "train.jsonl/run"])
def test_output_dir_that_cannot_be_a_folder(output_dir, tmp_path, capsys):
    message = train_fails(capsys, tmp_path, output_dir=str(tmp_path / output_dir))
    assert "train.jsonl" in message


@pytest.mark.parametrize("command", [["train", "--resume_from_checkpoint"], ["eval"]],
                         ids=["train", "eval"])
def test_folder_without_checkpoint(command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    message = fails(capsys, *command, tmp_path / "run")
    assert message.startswith(f"rlsd: {tmp_path}/run holds no checkpoint")


def test_a_model_beside_another_config_is_evaluated(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=1).train()
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "run" / "checkpoint-1").rename(folder / "x")
    (folder / "config.yaml").write_text("unlike: a run's\n", encoding="utf-8")
    given = ["--train_dataset", write_rows(tmp_path / "x.jsonl", problems(8)), "--eval_size", "2",
             "--max_completion_length", "8"]
    assert main(["eval", str(folder / "x"), *given, "--device", "cpu"]) == 0
    assert "on 2 held-out questions" in capsys.readouterr().out


def test_nothing_to_evaluate(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=1).train()
    message = fails(capsys, "eval", tmp_path / "run", "--eval_size", "0")
    assert "nothing to evaluate" in message
