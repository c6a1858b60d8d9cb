"""rlsd compare: plans, resumption, crashed arms, and what it leaves."""

import csv
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from runs import child, one_sentence, options, problems, write_rows

import rlsd.compare
from rlsd import UserError
from rlsd.cli import main
from rlsd.compare import Plan, compare, is_finished, load_plan, slug
from rlsd.reports.report import read_metrics
from rlsd.reports.tables import ACCURACY

ROOT = Path(__file__).parent.parent


def crash(prompts, completions, completion_ids, **columns):
    """A reward function that takes its process with it, as an out-of-memory kill does."""
    if os.path.exists("crash-no-more"):
        return [sum(ids) % 5 / 4 for ids in completion_ids]
    os._exit(7)


def refuse(prompts, completions, **columns):
    raise KeyError("no such column")


def plan(folder, **changed):
    base = options(folder, eval_steps=1, max_steps=2)
    del base["output_dir"]
    return Plan(**{
        "output_dir": str(folder / "compare"), "seeds": [3, 5], "base": base,
        "arms": {"GRPO": {"objective": "grpo"}, "RLSD": {"objective": "rlsd"}}, **changed,
    })


@pytest.fixture
def launched(monkeypatch):
    """Names of the runs that were started, in order."""
    names, real = [], rlsd.compare.run_all

    def recorded(configs, *args):
        names.extend(configs)
        return real(configs, *args)

    monkeypatch.setattr(rlsd.compare, "run_all", recorded)
    return names


def test_a_comparison_runs_resumes_and_reports_a_crashed_arm(tmp_path, launched, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = {
        "GRPO": {"objective": "grpo"}, "RLSD": {"objective": "rlsd"},
        "killed": {"reward_funcs": ["test_compare.crash"]},
        "refused": {"reward_funcs": ["test_compare.refuse"]},
    }
    lines = []
    found = compare(plan(tmp_path, arms=arms, processes=2), log=lines.append)
    names = [(arm, seed) for seed in (3, 5) for arm in arms]
    assert launched == names
    assert {a: sorted(s) for a, s in found["runs"].items()} == {
        "GRPO": [3, 5], "RLSD": [3, 5], "killed": [], "refused": []
    }
    assert set(found["crashed"]) == set(found["missing"]) == {
        (a, s) for a in ("killed", "refused") for s in (3, 5)
    }
    assert found["crashed"]["killed", 3] == "its process ended with exit code 7."
    assert "reward function refuse raised KeyError" in found["crashed"]["refused", 5]
    text = "\n".join(lines)
    assert "--arm 'killed' --seed 3" in text and "no such column" in text
    folder = tmp_path / "compare"
    assert "Traceback" in (folder / "refused" / "seed-3.log").read_text()
    # An ordinary run folder, and summaries of what is in it.
    records = read_metrics(folder / "grpo" / "seed-5")
    assert [r["step"] for r in records] == [0, 1, 2]
    summary = found["runs"]["GRPO"][5]
    assert summary["curves"][ACCURACY] == [r[ACCURACY] for r in records] and summary["seconds"] > 0
    table = (folder / "table.txt").read_text()
    assert table in text and [x.split()[0] for x in table.splitlines()[2:4]] == ["GRPO", "RLSD"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((folder / "results.json").read_text())
    assert saved["runs"]["GRPO"]["5"] == summary and saved["plan"]["baseline"] == "GRPO"
    assert len(list(csv.DictReader(open(folder / "table.csv")))) == 2

    # One crashed run alone, mended: nothing else is touched.
    launched.clear()
    (tmp_path / "crash-no-more").touch()
    kept = (folder / "grpo" / "seed-3" / "metrics.jsonl").read_text()
    found = compare(plan(tmp_path, arms=arms), arm="killed", seed=5, log=lines.append)
    assert launched == [("killed", 5)] and found["crashed"] == {}
    assert list(found["runs"]["killed"]) == [5] and list(found["runs"]["GRPO"]) == [3, 5]
    assert (folder / "grpo" / "seed-3" / "metrics.jsonl").read_text() == kept
    assert "killed" in (folder / "table.txt").read_text()
    assert not (folder / "killed" / "seed-5.error").exists()
    assert (folder / "refused" / "seed-5.error").exists()

    # A run cut short goes on from its checkpoint; one of other options is refused.
    launched.clear()
    whole = read_metrics(folder / "rlsd" / "seed-3")
    longer = plan(tmp_path, seeds=[3])
    longer.base = {**longer.base, "save_steps": 1}
    with pytest.raises(UserError, match="seed-3 was run with another save_steps \\(0, now 1\\)"):
        compare(longer, log=lines.append)
    (folder / "rlsd" / "seed-3" / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in whole[:2])
    )
    for path in (folder / "rlsd" / "seed-3").glob("checkpoint-*"):
        path.rename(path.with_name("elsewhere"))
    found = compare(plan(tmp_path), log=lines.append)
    assert launched == [("RLSD", 3)] and found["missing"] == []
    again = read_metrics(folder / "rlsd" / "seed-3")
    assert [r["reward"] for r in again[1:]] == [r["reward"] for r in whole[1:]]


def test_all_arms_start_alike_and_share_questions(tmp_path):
    lines = []
    arms = {"GRPO": {"objective": "grpo"}, "SFT": {"objective": "sft"}}
    base = plan(tmp_path).base | {
        "model_name_or_path": "scratch", "scratch_steps": 2, "max_steps": 1,
        "privileged_template": "{privileged_context} {prompt}", "eval_steps": 1,
    }
    with pytest.raises(UserError, match="^arm SFT keeps 1 training rows and arm GRPO 8, .*dropped"):
        compare(plan(tmp_path, arms=arms, base=base), log=lines.append)
    base["max_completion_length"], known = 32, tmp_path / "compare" / "warm-start"
    with pytest.raises(UserError, match="was made with another max_completion_length .6, now 32"):
        compare(plan(tmp_path, arms=arms, base=base), log=lines.append)
    shutil.rmtree(known)
    found = compare(plan(tmp_path, arms=arms, base=base, goals=[0.0]), log=lines.append)
    table = (tmp_path / "compare" / "table.md").read_text()
    assert "| never |" not in table.split("\n")[2]  # a goal met at the start is met at step 0
    starts = {s["curves"]["eval/pass@1_greedy"][0] for a in found["runs"].values()
              for s in a.values()}
    assert len(starts) == 1 and found["missing"] == []
    config = yaml.safe_load((tmp_path / "compare" / "sft" / "seed-5" / "config.yaml").read_text())
    assert config["model_name_or_path"] == str(tmp_path / "compare" / "warm-start")
    assert config["dataset_seed"] == 3 and config["seed"] == 5


def test_ready_made_parts_of_an_arm():
    made = Plan(output_dir="x", arms={"a": {"objective": "grpo"}, "b": None}, seeds=2)
    assert made.seeds == [0, 1] and made.baseline == "a" and made.arms["b"] == {}
    assert made.options("b")["save_steps"] == 0
    assert Plan(output_dir="x", arms={"b": {}}).baseline is None
    assert slug("RLSD, eps_w 0.2") == "rlsd-eps-w-0.2" and slug("GRPO+OPSD") == "grpo-and-opsd"


BAD = {
    "no-output": ({"output_dir": ""}, "output_dir must be a folder"),
    "no-arms": ({"arms": {}}, "arms must be a mapping"),
    "arms-list": ({"arms": ["grpo"]}, "arms must be a mapping"),
    "arm-text": ({"arms": {"a": "grpo"}}, "arm a must be a mapping"),
    "seeds": ({"seeds": [0, 0]}, "seeds must be different whole numbers"),
    "seeds-text": ({"seeds": "0"}, "seeds must be a list"),
    "no-seeds": ({"seeds": []}, "seeds must be a list"),
    "processes": ({"processes": 0}, "processes must be a whole number from 1"),
    "goals": ({"goals": ["high"]}, "goals must be a list of numbers"),
    "baseline": ({"baseline": "PPO"}, "baseline must be one of GRPO, RLSD"),
    "same-folder": ({"arms": {"a b": {}, "A-B": {}}}, "no folder name of its own"),
    "no-letters": ({"arms": {"++": {}, "?": {}}}, "no folder name of its own"),
    "own-seed": ({"arms": {"a": {"seed": 1}}}, "seed is set by the comparison"),
    "epochs": ({"arms": {"a": {"max_steps": None, "num_train_epochs": 1}}}, "set max_steps"),
    "push": ({"arms": {"a": {"push_to_hub": True}}}, "leave push_to_hub out"),
}


@pytest.mark.parametrize("changed, words", BAD.values(), ids=BAD)
def test_a_bad_plan_is_one_sentence(changed, words, tmp_path):
    with pytest.raises(UserError) as error:
        compare(plan(tmp_path, **changed))
    message = str(error.value)
    assert words in message and message.endswith(".") and ". " not in message
    assert not (tmp_path / "compare").exists()


NEEDS = {
    "unknown-option": ({"epsilonn": 1}, "did you mean epsilon?"),
    "no-teacher": ({"objective": "opd"}, "opd needs an external teacher"),
    "no-reference": ({"objective": "sft"}, "has no reference solution"),
    "no-hint": ({"objective": "opsd"}, "has no privileged context"),
    "no-evaluation": ({"eval_steps": 0}, "needs held-out questions"),
    "no-such-teacher": ({"objective": "opd", "teacher_model_name_or_path": "nowhere"}, "nowhere"),
    "other-vocabulary": (
        {"objective": "opd", "teacher_model_name_or_path": "teacher"}, "another vocabulary"
    ),
}


@pytest.mark.parametrize("arm, words", NEEDS.values(), ids=NEEDS)
def test_what_an_arm_lacks_is_said_before_the_first_rollout(arm, words, tmp_path, monkeypatch,
                                                           launched):
    from rlsd.demo import save_model, tiny_model, word_tokenizer

    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(5, seed=0, hidden=16, layers=1), word_tokenizer(["a"]), "teacher")
    write_rows(tmp_path / "train.jsonl", [r | {"privileged_context": ""} for r in problems(12)])
    arms = {"GRPO": {"objective": "grpo"}, "mine": {"objective": "grpo", **arm}}
    with pytest.raises(UserError) as error:
        compare(plan(tmp_path, arms=arms))
    message = str(error.value)
    assert words in message and message.startswith("arm mine: ") and launched == []


@pytest.mark.parametrize("arguments, words", [
    ([], "Usage: rlsd compare --config x.yaml"),
    (["--config", "x.yaml", "--max_steps", "3"], "Usage: rlsd compare"),
    (["--config", "nowhere.yaml"], "Cannot read the config nowhere.yaml"),
    (["--config", "x.yaml", "--arm", "PPO"], "--arm must be one of GRPO, RLSD, but got 'PPO'."),
    (["--config", "x.yaml", "--seed", "9"], "--seed must be one of [3, 5], but got 9."),
    (["--config", "y.yaml"], "Unknown entry 'sedes' of a comparison; did you mean seeds?"),
], ids=["nothing", "train-option", "no-file", "arm", "seed", "entry"])
def test_command_line_mistakes(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entries = dataclasses.asdict(plan(tmp_path))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "y.yaml").write_text(yaml.safe_dump({**entries, "sedes": [1]}))
    capsys.readouterr()  # what saving the model has drawn
    assert main(["compare", *arguments]) == 2
    assert words in one_sentence(capsys.readouterr().err)


def test_command_line_runs_one_arm_and_overrides_the_plan(tmp_path, capsys, launched):
    path = tmp_path / "x.yaml"
    entries = dataclasses.asdict(plan(tmp_path))
    entries["base"]["max_steps"] = 1
    path.write_text(yaml.safe_dump(entries))
    other = str(tmp_path / "elsewhere")
    assert load_plan(path, processes=2).processes == 2
    assert main([
        "compare", "--config", str(path), "--arm", "RLSD", "--seed", "5", "--output_dir", other
    ]) == 0
    assert launched == [("RLSD", 5)]
    shown = capsys.readouterr().out
    assert "Not run yet: GRPO seed 3, GRPO seed 5, RLSD seed 3" in shown and other in shown
    config = load_plan(path, output_dir=other).config("RLSD", 5)
    assert is_finished(config) and not is_finished(load_plan(path).config("RLSD", 5))


def test_the_example_is_a_plan_whose_arms_are_valid():
    made = load_plan(ROOT / "examples" / "compare.yaml")
    assert made.baseline == "GRPO" and len(made.arms) == 12
    for arm in made.arms:
        assert made.config(arm, 0).max_steps == 60


def test_a_killed_comparison_leaves_no_run_behind(tmp_path):
    path = tmp_path / "x.yaml"
    entries = dataclasses.asdict(plan(tmp_path, seeds=[3]))
    entries["base"]["max_steps"] = 100_000
    path.write_text(yaml.safe_dump(entries))
    process = child("-m", "rlsd.cli", "compare", "--config", str(path))
    metrics = tmp_path / "compare" / "grpo" / "seed-3" / "metrics.jsonl"

    def size(after):
        """Bytes once the condition holds, polled for two minutes."""
        for _ in range(1200):
            if metrics.exists() and after(metrics.stat().st_size):
                return metrics.stat().st_size
            time.sleep(0.1)
        raise AssertionError(process.communicate())

    size(lambda n: n > 0)
    process.kill()
    process.wait()
    time.sleep(2)
    stopped = metrics.stat().st_size
    time.sleep(2)
    assert metrics.stat().st_size == stopped
    process.stdout.close()
    process.stderr.close()
