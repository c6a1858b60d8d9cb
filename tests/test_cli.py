"""The command line: what each command prints and leaves, and how it ends."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
import yaml
from runs import (
    child,
    clean_logging,  # noqa: F401
    fails,
    make_trainer,
    one_sentence,
    options,
    problems,
    quick,  # noqa: F401
    write_config,
    write_rows,
)

import rlsd
import rlsd.demo
import rlsd.reports.report
import rlsd.trainer
from rlsd import __version__
from rlsd.checks import bench
from rlsd.checks.validate import FEATURES
from rlsd.cli import COMMANDS, main, parse_options
from rlsd.config import TrainConfig, make_config
from rlsd.options import load_yaml
from rlsd.policy import checkpoint
from rlsd.tasks.data import question, split_data
from rlsd_kernels import torch_impl


def test_interrupt_inside_a_step(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def reward(completions, **columns):
        if (run / "checkpoint-2").exists():
            raise KeyboardInterrupt
        return [float(i % 3) for i in range(len(completions))]

    monkeypatch.setattr("runs.sum_reward", reward)
    config = write_config(tmp_path, max_steps=5, save_steps=1)
    assert "interrupted" in fails(capsys, "train", "--config", config, status=130)
    assert sorted(p.name for p in run.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    assert main(["train", "--resume_from_checkpoint", str(run)]) == 0
    assert checkpoint.latest(run).name == "checkpoint-5"


def test_real_sigint(tmp_path):
    process = child(
        "-m", "rlsd.cli", "train", "--config", write_config(tmp_path, max_steps=100_000,
                                                            save_steps=2, save_total_limit=2)
    )
    run, began = tmp_path / "run", time.monotonic()
    while not (run / "checkpoint-4").exists() and time.monotonic() - began < 90:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in one_sentence(err) and "step 3/100000" in out
    assert not list(run.glob(".partial*"))
    last = checkpoint.latest(run)
    assert checkpoint.load_state(last)["step"] == int(last.name.split("-")[1]) >= 4
    transformers.AutoModelForCausalLM.from_pretrained(last)


def test_train_with_config_and_overrides(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rlsd.trainer, "plot_runs", rlsd.reports.report.plot_runs)
    config = write_config(tmp_path, eval_steps=1, save_steps=1)
    capsys.readouterr()  # bars of a first model
    assert main(["train", "--config", config, "--max_steps", "3", "--learning-rate=1e-3",
                 "--beta", "0.5", "--reward_funcs", "[exact_match, runs.sum_reward]"]) == 0
    out, err = capsys.readouterr()
    run = tmp_path / "run"
    assert not err.strip()
    assert f"rlsd: 8 training questions, 4 held out, steps 1 to 3, in {run}" in out
    for step in (1, 2, 3):
        assert re.search(rf"step {step}/3 .*reward .*loss .*lambda .*s/step .*ETA \d+:\d\d", out)
    assert f"Done: {run}/checkpoint-3, {run}/curves.png" in out
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved == yaml.safe_load(Path(config).read_text()) | saved | {
        "max_steps": 3, "learning_rate": 1e-3, "beta": 0.5,
        "reward_funcs": ["exact_match", "runs.sum_reward"],
    }
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_resume_goes_on_with_the_options_of_the_run(tmp_path, capsys):
    config = write_config(tmp_path, rlsd_lambda=0.25)
    assert main(["train", "--config", config]) == 0
    assert "already at step 2; raise max_steps" in fails(
        capsys, "train", "--resume_from_checkpoint", tmp_path / "run"
    )
    assert main(["train", "--resume_from_checkpoint", str(tmp_path / "run"), "--max_steps", "3",
                 "--learning_rate", "0.004"]) == 0
    assert "steps 3 to 3" in capsys.readouterr().out
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert records[2]["rlsd/effective_lambda"] == pytest.approx(0.25 * 47 / 50)
    assert [r["learning_rate"] for r in records] == [0.01, 0.01, 0.004]


def test_resume_takes_a_config_and_refuses_another_folder(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=2).train()
    run, extra = str(tmp_path / "run"), tmp_path / "extra.yaml"
    extra.write_text("max_steps: 4\nlearning_rate: 0.003\n", encoding="utf-8")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    message = fails(
        capsys, "train", "--resume_from_checkpoint", run, "--output_dir", tmp_path / "branch"
    )
    assert f"in its own folder {run}" in message and not (tmp_path / "branch").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    # The run's options < the file < the command line.
    assert main(["train", "--resume_from_checkpoint", run, "--config", str(extra),
                 "--max_steps", "3"]) == 0
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [r["learning_rate"] for r in records] == [0.01, 0.01, 0.003]


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_none_on_the_command_line(text, tmp_path):
    config = write_config(tmp_path, max_steps=1, save_total_limit=3)
    assert main(["train", "--config", config, "--save_total_limit", text, "--delta", text]) == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert kept["save_total_limit"] is None and kept["delta"] is None


def test_none_in_a_file_is_none_on_the_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("delta: none\nmax_steps: None\nnum_train_epochs: 1\neval_dataset: none\n"
                    "report_to: none\n", encoding="utf-8")
    got = make_config(load_yaml(path))
    assert got.delta is None and got.max_steps is None and got.eval_dataset is None
    assert got.report_to == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three steps with evaluations."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, max_steps=3, eval_steps=3, save_steps=2)
    return folder / "run", trainer.train()


def shown(out):
    """{metric: printed value} of rlsd eval."""
    found = {}
    line = r"^  (\S+) +(-?[\d.]+)(?:  \[([\d.]+), ([\d.]+)\])?$"
    for name, value, low, high in re.findall(line, out, re.MULTILINE):
        found[name] = float(value)
        if low:
            found[f"{name}_low"], found[f"{name}_high"] = float(low), float(high)
    return found


def test_eval_of_run_and_checkpoint(finished, capsys):
    run, records = finished
    want = {k[5:]: round(v, 4) for k, v in records[-1].items() if k.startswith("eval/")}
    for path in (run, run / "checkpoint-3", f"{run}/checkpoint-3/"):
        assert main(["eval", str(path)]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{run}/checkpoint-3 on 4 held-out questions, ") and not err.strip()
        assert shown(out) == pytest.approx(want, abs=1e-4)
    assert main(["eval", str(run / "checkpoint-2"), "--eval_size", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run}/checkpoint-2 on 2 held-out questions, [95 % interval]\n")
    assert shown(out).keys() == want.keys()


def test_eval_of_a_plain_model_is_the_baseline_of_a_run(finished, tmp_path, capsys):
    """Step 0 of the run, of the same held-out questions, from the data or from its config."""
    run, records = finished
    given = options(run.parent)
    model, want = given["model_name_or_path"], {
        k[5:]: round(v, 4) for k, v in records[0].items() if k.startswith("eval/")
    }
    assert len(want) > 5 and records[0]["step"] == 0
    said = f"{model} on 4 held-out questions, [95 % interval]\n"
    asked = ["--eval_size", "4", "--max_completion_length", "6", "--reward_funcs",
             "runs.sum_reward", "--device", "cpu"]
    for arguments in (
        [model, "--config", run / "config.yaml"],
        [f"{model}/", "--train_dataset", given["train_dataset"], *asked],
    ):
        assert main(["eval", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(said) and not err.strip()
        assert shown(out) == pytest.approx(want, abs=1e-4)
    # Without training rows all of eval_dataset is asked.
    held_out = write_rows(tmp_path / "eval.jsonl", problems(3, seed=7))
    assert main(["eval", model, "--eval_dataset", held_out, *asked]) == 0
    assert " on 3 held-out questions" in capsys.readouterr().out


def test_eval_of_what_is_neither_a_run_nor_a_model(tmp_path, capsys):
    given = options(tmp_path)
    model, data = given["model_name_or_path"], given["train_dataset"]
    for arguments, words in (
        ([model], f"{model} is a model and no run, so eval needs --train_dataset, --eval_dataset"),
        (["me/model"], "There is no run folder or checkpoint me/model; if it is a model's hub id"),
        ([tmp_path, "--train_dataset", data], "holds no checkpoint of a run, and no model"),
        (["me/model", "--train_dataset", data], "Cannot load the model 'me/model'"),
        ([model, "--train_dataset", "nowhere.jsonl"], "Cannot read the dataset nowhere.jsonl"),
    ):
        assert words in fails(capsys, "eval", *arguments)


def test_eval_with_several_samples_shows_pass_at_k(finished, capsys):
    run, _ = finished
    assert main(["eval", str(run), "--num_generations_eval", "4"]) == 0
    got = shown(capsys.readouterr().out)
    names = [f"pass@{k}_sampled" for k in (1, 2, 4)]
    assert got[names[0]] <= got[names[1]] <= got[names[2]]
    assert all(got[f"{n}_low"] <= got[n] <= got[f"{n}_high"] for n in [*names, "pass@1_greedy"])
    assert "pass@2_greedy" not in got


def test_plot_of_two_runs(finished, tmp_path, capsys):
    run, _ = finished
    target = tmp_path / "both.png"
    assert main(["plot", str(run), f"{run}/", "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_bytes()[:4] == b"\x89PNG"
    (run / "curves.png").unlink()
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/curves.png\n"
    assert (run / "curves.png").stat().st_size > 5000


def test_plot_to_a_bad_place(finished, tmp_path, capsys):
    for output in (tmp_path / "no" / "x.png", tmp_path / "x.nonsense"):
        assert str(output) in fails(capsys, "plot", finished[0], "--output", output)


@pytest.fixture
def no_interpreter(monkeypatch):
    """Leaves Triton out: test_validate.py has it, and it takes half a minute."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_validate_prints_the_table(capsys, no_interpreter):
    assert main(["validate"]) == 0
    out = capsys.readouterr().out
    for impl in ("cuda", "triton", "torch", "ref"):
        assert re.search(rf"^{impl} +(not run: |float)", out, re.MULTILINE)
    rows = re.findall(r"^torch +(\w+) +(.+?) +([\d.e+-]+) +([\d.e+-]+) +([\d.e+-]+) +(\d+)%  ok$",
                      out, re.MULTILINE)
    assert {row[0] for row in rows} == {"float64", "float32", "bfloat16", "float16"}
    assert len(rows) == 4 * len(FEATURES) and all(0 <= float(row[2]) <= 1e-4 for row in rows)
    assert all(0 <= int(row[5]) <= 100 for row in rows)
    assert out.endswith("All within the contract.\n")


def test_validate_fails_on_a_wrong_implementation(capsys, monkeypatch, no_interpreter):
    right = torch_impl.token_rows
    monkeypatch.setattr(
        torch_impl, "token_rows", lambda *a, **k: tuple(1.01 * x for x in right(*a, **k))
    )
    assert main(["validate"]) == 1
    out = capsys.readouterr().out
    wrong = 4 * len(FEATURES)
    assert len(re.findall(r"^torch .*FAILED$", out, re.MULTILINE)) == wrong
    assert f"{wrong} rows broke the contract" in out and not re.search(r"^ref .*FAILED", out, re.M)


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    for arguments in (["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"rlsd {c}" in out for c in COMMANDS)
    assert main([]) == 2
    assert "rlsd train" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"rlsd {command}" in out and not err
    others = [c for c in COMMANDS if c != command and re.search(rf"^  rlsd {c} ", out, re.M)]
    assert command == "train" or not others


def test_help_of_bench_names_what_it_takes(capsys):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    for word in (*(f"--{name} " for name in bench.OPTIONS), *bench.PROFILES, *bench.DTYPES):
        assert word in out, word


def test_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "rlsd", "--version"], stdout=subprocess.PIPE, text=True, check=True,
    )
    assert run.stdout == f"{__version__}\n"


@pytest.mark.parametrize("given, want", [
    ("none", "none"), ("wandb", "wandb"), ("[wandb, trackio]", ["wandb", "trackio"]),
])
def test_none_is_a_value_where_it_is_a_choice(given, want):
    parsed = parse_options(["--report_to", given, "--scale_rewards", "none", "--delta", "none"])
    assert parsed == {"report_to": want, "scale_rewards": "none", "delta": None}
    kept = TrainConfig(**parsed).report_to
    assert kept == ([] if want == "none" else want if isinstance(want, list) else [want])


def test_train_help_lists_every_option_with_its_default(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert len(re.findall(rf"^  --{name} ", out, re.M)) == 1, name
    assert "--rlsd_lambda 0.5\n" in out and "--reward_funcs [exact_match]\n" in out
    assert "--bf16 false\n" in out and "--delta 3.0  [a number, or none]\n" in out


def test_train_help_shows_groups_and_choices(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out.partition("in brackets:\n")[2].strip("\n")
    assert all(len(line) <= 70 or " " not in line.strip() for line in out.splitlines())
    sections = {part.partition("\n")[0]: part for part in out.split("\n\n")}
    of_option = {
        name: title for title, part in sections.items()
        for name in re.findall(r"^  --(\w+) ", part, re.M)
    }
    assert of_option.keys() == TrainConfig.__dataclass_fields__.keys()
    for name, title in {
        "seed": "Model and run", "lora_r": "LoRA", "eval_size": "Data", "temperature": "Rollouts",
        "vllm_mode": "Rollouts by vLLM", "leak_markers": "Rewards", "warmup_steps": "Optimizer",
        "rlsd_lambda": "Objective and teacher", "save_steps": "Evaluation, logging, checkpoints",
    }.items():
        assert of_option[name] == title
    joined = " ".join(out.split())
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["choices"]:
            assert f"{' | '.join(field.metadata['choices'])}]" in joined, field.name
    assert "--scale_rewards group [group | batch | none]" in joined
    assert "--report_to [tensorboard] [any of tensorboard | wandb | trackio | none]" in joined


@pytest.mark.parametrize(
    "arguments, passed",
    [
        ([], {"output_dir": "runs/demo"}),
        (["--seed", "3"], {"output_dir": "runs/demo", "seed": 3}),
        (["--output_dir", "x", "--max_steps", "5", "--num_seeds=1"],
         {"output_dir": "x", "max_steps": 5, "num_seeds": 1}),
    ],
    ids=["bare", "seed", "all"],
)
def test_train_without_a_config_is_the_demo(arguments, passed, monkeypatch):
    calls = []
    monkeypatch.setattr(rlsd.demo, "run_demo", lambda **options: calls.append(options))
    assert main(["train", *arguments]) == 0
    assert calls == [passed]


def test_missing_package_is_named(capsys, monkeypatch):
    def no_matplotlib(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("rlsd.reports.report.plot_runs", no_matplotlib)
    message = fails(capsys, "plot", "run")
    assert message == "rlsd: plot needs the package matplotlib: pip install 'rlsd[train]'."


def test_scratch_builds_its_own_model(tmp_path, capsys):
    config = write_config(
        tmp_path, model_name_or_path="scratch", scratch_steps=2, max_steps=1, eval_size=4,
        reward_funcs=["exact_match"], max_completion_length=4,
    )
    assert main(["train", "--config", config]) == 0
    assert (tmp_path / "run-warm-start" / "model.safetensors").exists()
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-1"
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "already exists" in fails(capsys, "train", "--config", config)


def test_entry_point_is_main():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'rlsd = "rlsd.cli:main"\n' in project


def test_helpers_write_what_the_tests_read(tmp_path):
    # The tests above mean nothing if the plain configuration were not accepted.
    assert main(["train", "--config", write_config(tmp_path, max_steps=1)]) == 0
    assert set(options(tmp_path)) <= set(TrainConfig.__dataclass_fields__)


def test_training_outlives_its_terminal(tmp_path):
    """`rlsd train | head -1`: what is printed is lost, the run and its exit status are not."""
    process = child(
        "-m", "rlsd.cli", "train", "--config", write_config(tmp_path, max_steps=3, eval_steps=1)
    )
    assert process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=120) == 0 and stderr == ""
    run = tmp_path / "run"
    assert checkpoint.latest(run).name == "checkpoint-3"
    assert [json.loads(x)["step"] for x in open(run / "metrics.jsonl")] == [0, 1, 2, 3]


def reward_that_fails(prompts, completions, **columns):
    print("\ud800 and \u221e", flush=True)
    reward_that_fails.calls = getattr(reward_that_fails, "calls", 0) + 1
    if reward_that_fails.calls == 2:
        raise ConnectionError("the judge is away")
    return [float(i % 3) for i in range(len(completions))]


@pytest.mark.parametrize("closed", ["reader", "both-readers", "from-the-start"])
def test_the_exit_status_is_true_without_a_terminal(closed, tmp_path):
    config = write_config(tmp_path, max_steps=3, reward_funcs=["test_cli.reward_that_fails"])
    arguments = ["-m", "rlsd.cli", "train", "--config", config]
    if closed == "from-the-start":
        arguments = ["-c", "import os, sys; os.close(1); os.close(2); os.execv(sys.executable, "
                     "[sys.executable, *sys.argv[1:]])", *arguments]
    process = child(*arguments, environment={"PYTHONIOENCODING": "ascii"})
    process.stdout.close()
    if closed == "both-readers":
        process.stderr.close()
    elif closed == "reader":
        assert "the judge is away" in one_sentence(process.stderr.read())
    assert process.wait(timeout=120) == 2
    assert checkpoint.latest(tmp_path / "run").name == "checkpoint-1"


def test_the_baseline_is_shown(tmp_path, capsys):
    config = write_config(tmp_path, max_steps=4, eval_steps=3, logging_steps=10)
    assert main(["train", "--config", config]) == 0
    shown = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    # Every evaluation is shown, whether or not a progress line is due.
    assert [x.split("  ")[0] for x in shown] == ["step 0/4", "step 3/4", "step 4/4"]
    assert all("pass@1_sampled " in x for x in shown) and "s/step" not in shown[0]


@pytest.mark.parametrize("drawn", [True, False])
def test_only_curves_that_are_drawn_are_announced(drawn, tmp_path, capsys):
    assert main(["train", "--config", write_config(tmp_path, plot_curves=drawn)]) == 0
    assert ("curves.png" in capsys.readouterr().out) is drawn


def test_a_resumed_run_keeps_the_name_of_its_model(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=1).train()
    run, model = tmp_path / "run", str(tmp_path / "model")
    before = (run / "config.yaml").read_bytes()
    message = fails(
        capsys, "train", "--resume_from_checkpoint", run, "--model_name_or_path", tmp_path / "other"
    )
    assert message == (
        "rlsd: A resumed run goes on with the model of its checkpoint, which was made with "
        f"model_name_or_path {model}, but model_name_or_path is {tmp_path}/other; leave it out."
    )
    message = fails(
        capsys, "train", "--resume_from_checkpoint", run, "--lora_target_modules", "q_proj"
    )
    assert "made with lora_target_modules ['all-linear'], but" in message
    assert (run / "config.yaml").read_bytes() == before
    assert main(["train", "--resume_from_checkpoint", str(run), "--max_steps", "2",
                 "--model_name_or_path", f"{tmp_path}/run/../model",
                 "--lora_target_modules", "all-linear"]) == 0


def test_a_second_scratch_run_cannot_use_the_first_s_warm_start(tmp_path, capsys):
    lock = checkpoint.RunLock(tmp_path / "run-warm-start")
    code = ("import sys; from rlsd.cli import main; "
            "sys.exit(main(['train', '--config', sys.argv[1], '--scratch_steps', '1']))")
    process = child("-c", code, write_config(tmp_path, model_name_or_path="scratch"))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and f"in use by process {os.getpid()}" in one_sentence(stderr)
    assert lock and not (tmp_path / "run").exists()


def held_out_of(options):
    rows, held_out = split_data(make_config(options))
    return [{question(row) for row in part} for part in (rows, held_out)]


@pytest.mark.parametrize("split, changed", [
    ({"eval_size": 4}, {"eval_size": 8}), ({"eval_size": 4}, {"eval_split_size": 6}),
    ({"eval_split_size": 4}, {"seed": 1, "dataset_seed": 1}), ({"eval_split_size": 4}, {"seed": 1}),
])
def test_no_question_that_a_run_trained_on_is_held_out_later(split, changed, tmp_path, capsys):
    config = write_config(tmp_path, **split)
    assert main(["train", "--config", config]) == 0
    was = load_yaml(config)
    trained, own = held_out_of(was)
    given = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), *given]) == 0
    asked = int(re.search(r"on (\d+) held-out", capsys.readouterr().out)[1])
    pinned = {"dataset_seed": 0} if "dataset_seed" not in changed else {}
    wanted = held_out_of({**was, **pinned, **changed})[1]
    assert asked == len(wanted - trained)
    again = ["train", "--resume_from_checkpoint", str(tmp_path / "run"), "--max_steps", "3", *given]
    if wanted & trained:
        assert "has trained on" in fails(capsys, *again)
    else:
        assert wanted == own and main(again) == 0
        assert held_out_of(load_yaml(tmp_path / "run" / "config.yaml"))[1] == own
