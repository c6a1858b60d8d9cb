import dataclasses
import importlib.util
import json
import math
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml

from rlsd import TrainConfig, UserError
from rlsd.reports.report import (
    METRICS,
    PANELS,
    Reporter,
    hub_repository,
    model_card,
    number,
    plot_runs,
    print_samples,
    push,
    read_metrics,
    require_packages,
    series,
    write_completions,
)

PNG = b"\x89PNG\r\n\x1a\n"


def reporter(folder, start_step=0, **options):
    return Reporter(folder, {"seed": 3, **options}, [], 10, start_step)


def log_steps(folder, steps, start_step=0, offset=0.0):
    with reporter(folder, start_step) as report:
        for step in steps:
            report.log(step, {"reward": step / 10 + offset})


def lines(folder):
    return (folder / METRICS).read_text().splitlines()


@pytest.mark.parametrize("value, want", [
    (0.5, 0.5), (3, 3.0), (True, 1.0), (torch.tensor(2.5), 2.5), (math.nan, None),
    (math.inf, None), (-math.inf, None), (torch.tensor(math.nan), None),
], ids=repr)
def test_number(value, want):
    assert number(value) == want and type(number(value)) is type(want)


def test_metrics_round_trip_with_null_for_what_was_not_measured(tmp_path):
    with reporter(tmp_path / "new" / "run") as report:
        report.log(0, {"eval/pass@1_greedy": 0.25})
        record = report.log(1, {"reward": torch.tensor(0.5), "kl": math.nan, "loss": -math.inf})
        assert record == {"step": 1, "reward": 0.5, "kl": None, "loss": None}
        # Each line is on disk as soon as it is logged: a crash keeps what was measured.
        assert len(lines(tmp_path / "new" / "run")) == 2
    assert read_metrics(tmp_path / "new" / "run") == [
        {"step": 0, "eval/pass@1_greedy": 0.25}, record
    ]
    assert json.loads(lines(tmp_path / "new" / "run")[1])["kl"] is None


def test_config_is_written_beside_the_metrics(tmp_path):
    options = vars(TrainConfig(learning_rate=3e-4, reward_weights=None))
    with Reporter(tmp_path, options, [], 1):
        pass
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == options


def test_tensorboard_gets_finite_values_only(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Reporter(tmp_path, {}, ["tensorboard"], 2) as report:
        report.start_trackers()
        report.log(1, {"reward": 0.5, "kl": math.nan})
        report.log(2, {"reward": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 1.0)]


class Service(types.ModuleType):
    """wandb or trackio, as accelerate's trackers use them."""

    def __init__(self, name):
        super().__init__(name)
        self.made, self.logged, self.finished, self.broken = [], [], 0, ""

    def init(self, **given):
        self._fail("init")
        self.made.append(given)
        return self

    def log(self, values, step):
        self._fail("log")
        self.logged.append((step, values))

    def finish(self):
        self._fail("finish")
        self.finished += 1

    def _fail(self, what):
        if what == self.broken:
            raise OSError(f"no {what} today. Details follow")


@pytest.fixture
def services(monkeypatch):
    made = {name: Service(name) for name in ("wandb", "trackio")}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return made


def run_of(folder, names, steps, start_step=0):
    with Reporter(folder, {"seed": 3}, names, 10, start_step) as report:
        report.start_trackers()
        for step in steps:
            report.log(step, {"reward": step / 10, "kl": math.nan})


def test_wandb_and_trackio_get_finite_values_and_the_options(services, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "mine"
    run_of(folder, ["wandb", "trackio"], [1, 2])
    for service in services.values():
        assert service.logged == [(1, {"reward": 0.1}), (2, {"reward": 0.2})]
        assert service.finished == 1
    same = {"project": "rlsd", "name": "runs/mine", "config": {"seed": 3}}
    assert services["wandb"].made == [same | {"dir": str(folder)}]
    assert services["trackio"].made == [same | {"resume": "never"}]
    # A resumed run goes on in the same one, which wandb's own folder names.
    (folder / "wandb" / "offline-run-20260101_235959-my-own-id").mkdir(parents=True)
    (folder / "wandb" / "latest-run").symlink_to("offline-run-20260101_235959-my-own-id")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    run_of(folder, ["wandb", "trackio"], [3], start_step=2)
    assert services["wandb"].made[1] == same | {
        "project": "ours", "dir": str(folder), "id": "my-own-id", "resume": "allow"
    }
    assert services["trackio"].made[1] == same | {"resume": "allow"}
    assert [r["step"] for r in read_metrics(folder)] == [1, 2, 3]


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(services, tmp_path, capsys, broken):
    services["wandb"].broken = broken
    run_of(tmp_path, ["wandb", "trackio"], [1, 2, 3])
    said = f"wandb failed (no {broken} today); {METRICS} has what it misses."
    assert capsys.readouterr().out.strip() == said
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    assert [step for step, _ in services["trackio"].logged] == [1, 2, 3]
    assert services["trackio"].finished == 1


def test_a_tracker_that_cannot_start_is_a_sentence(services, tmp_path):
    services["trackio"].broken = "init"
    with pytest.raises(UserError) as error:
        run_of(tmp_path, ["wandb", "trackio"], [1])
    assert str(error.value) == (
        "report_to: trackio cannot start (no init today); set it up, or leave it out."
    )
    assert services["wandb"].finished == 1


@pytest.mark.parametrize("name, install", [
    ("wandb", "'rlsd[wandb]'"), ("trackio", "'rlsd[trackio]'"), ("tensorboard", "'rlsd[log]'"),
])
def test_the_package_of_a_tracker_is_named_before_the_run(monkeypatch, name, install):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *_: None if n == name else find("json")
    )
    with pytest.raises(UserError) as error:
        require_packages(TrainConfig(report_to=["trackio", "wandb", "tensorboard"]))
    assert str(error.value) == f"report_to: {name} needs the package {name}: pip install {install}."
    require_packages(TrainConfig(report_to="none"))


def test_resume_truncates_what_came_after_the_checkpoint(tmp_path):
    log_steps(tmp_path, range(6))
    log_steps(tmp_path, [4, 5, 6], start_step=3, offset=1.0)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5, 6]
    assert [r["reward"] for r in records] == pytest.approx([0, 0.1, 0.2, 0.3, 1.4, 1.5, 1.6])


def test_a_full_disk_at_a_resume_leaves_the_options_of_the_run(tmp_path, monkeypatch):
    with Reporter(tmp_path, {"learning_rate": 3e-4, "weight_decay": 0.1}, [], 5) as report:
        report.log(1, {"reward": 0.5})
    before, write = (tmp_path / "config.yaml").read_text(), Path.write_text

    def cut(path, text, **options):
        write(path, text[:22], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="No space left"):
        Reporter(tmp_path, {"learning_rate": 3e-4, "weight_decay": 0.2}, [], 5, start_step=1)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_new_run_does_not_inherit_old_records(tmp_path):
    log_steps(tmp_path, [1, 2])
    log_steps(tmp_path, [1])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def damage(folder, line, text):
    content = lines(folder)
    content[line] = text
    (folder / METRICS).write_text("\n".join(content))


@pytest.mark.parametrize("text", ['{"step": 3, "rew', "", "\0\0\0"], ids=repr)
def test_a_damaged_last_line_is_left_out(tmp_path, text):
    log_steps(tmp_path, [1, 2, 3])
    damage(tmp_path, 2, text)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    log_steps(tmp_path, [3], start_step=2)  # and a resume repairs the file
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("text", ['{"step": 2, "rew', "", "7", '["a"]'], ids=repr)
def test_a_damaged_middle_line_is_named(tmp_path, text):
    log_steps(tmp_path, [1, 2, 3])
    damage(tmp_path, 1, text)
    with pytest.raises(UserError) as error:
        read_metrics(tmp_path)
    assert str(error.value) == f"Line 2 of {tmp_path / METRICS} is damaged."


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()], ids=["absent", "empty"])
def test_a_folder_without_metrics_is_no_run(tmp_path, make):
    folder = tmp_path / "x"
    make(folder)
    for call in (read_metrics, lambda f: plot_runs({"x": [f]}, tmp_path / "x.png")):
        with pytest.raises(UserError) as error:
            call(folder)
        assert str(error.value) == f"{folder} is not a run folder: it has no {METRICS}."


def test_series_skips_what_was_not_measured():
    records = [{"step": 0, "a": 1.0}, {"step": 1}, {"step": 2, "a": None}, {"step": 3, "a": 0.0}]
    assert series(records, "a") == ([0, 3], [1.0, 0.0])
    assert series(records, "b") == ([], [])


def records(seed, names=("reward", "entropy", "eval/pass@1_sampled")):
    return [{"step": s, **{n: s / 10 + seed for n in names}} for s in range(4)]


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure that is saved, before it is closed."""
    import matplotlib.figure

    saved = []
    original = matplotlib.figure.Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.extend(self.axes)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def curves(axis):
    return [line.get_ydata().tolist() for line in axis.lines]


def test_plot_of_one_run_folder(tmp_path, axes):
    log_steps(tmp_path, range(4))
    assert plot_runs({"rlsd": [tmp_path]}, tmp_path / "x.png") == tmp_path / "x.png"
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert [a.get_title() for a in axes] == ["training reward"]  # no panel without data
    assert curves(axes[0]) == [pytest.approx([0, 0.1, 0.2, 0.3])]
    assert axes[0].get_legend() is None


def test_plot_of_several_seeds_shows_each_and_their_mean(tmp_path, axes):
    runs = {"GRPO": [records(0), records(2)], "RLSD": [records(1)]}
    plot_runs(runs, tmp_path / "x.png", title="both")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert [a.get_title() for a in axes] == [
        "held-out pass@1, sampled", "training reward", "entropy (nats)"
    ]
    for axis in axes:
        zero = [0, 0.1, 0.2, 0.3]
        assert curves(axis) == [pytest.approx([x + k for x in zero]) for k in (0, 2, 1, 1)]
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["GRPO", "RLSD"]


def test_plot_of_bands_is_mean_and_deviation(tmp_path, axes):
    runs = {"GRPO": [records(0), records(2)], "RLSD": [records(1)]}
    plot_runs(runs, tmp_path / "x.png", panels=[("r", "reward")], bands=True)
    assert [a.get_title() for a in axes] == ["r"]
    zero = [0, 0.1, 0.2, 0.3]
    assert curves(axes[0]) == [pytest.approx([x + 1 for x in zero])] * 2  # no line per seed
    wide, thin = (band.get_paths()[0].vertices for band in axes[0].collections)
    at_step_2 = sorted({round(y, 6) for x, y in wide if x == 2})
    assert at_step_2 == pytest.approx([1.2 - 2**0.5, 1.2 + 2**0.5], abs=1e-5)
    assert {round(y, 6) for x, y in thin if x == 2} == {1.2}  # one seed has no deviation


def test_legend_of_many_runs_lies_outside_of_the_panels(tmp_path, axes):
    plot_runs({f"arm {k}": [records(k)] for k in range(5)}, tmp_path / "x.png")
    assert axes[0].get_legend() is None
    (legend,) = axes[0].figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [f"arm {k}" for k in range(5)]


def test_plot_of_all_panels_and_of_seeds_of_unequal_length(tmp_path, axes):
    names = [name for _, name in PANELS]
    runs = {"x": [records(0, names), records(1, names)[:2]]}
    plot_runs(runs, tmp_path / "x.png")
    assert [a.get_title() for a in axes] == [title for title, _ in PANELS]
    assert curves(axes[0])[2] == pytest.approx([0.5, 0.6, 0.2, 0.3])


@pytest.mark.parametrize("runs", [{}, {"x": [[]]}, {"x": [[{"step": 1, "loss": 2.0}]]}], ids=repr)
def test_nothing_to_plot_is_an_error(tmp_path, runs):
    with pytest.raises(UserError, match="nothing to plot"):
        plot_runs(runs, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name, reason", [
    ("absent/x.png", "No such file"), ("x.docx", "docx"), ("x.png/y.png", "Not a directory"),
])
def test_a_plot_that_cannot_be_written_is_one_sentence(tmp_path, name, reason):
    if name.startswith("x.png"):
        (tmp_path / "x.png").touch()
    with pytest.raises(UserError) as error:
        plot_runs({"x": [records(0)]}, tmp_path / name)
    message = str(error.value)
    assert message.startswith(f"Cannot write the plot {tmp_path / name}: ") and reason in message
    assert "\n" not in message and message.endswith(".")


def test_a_plot_without_an_extension_is_a_png(tmp_path):
    path = plot_runs({"x": [records(0)]}, tmp_path / "curves")
    assert path == tmp_path / "curves.png" and path.read_bytes().startswith(PNG)


def sample(prompt, advantage, weights, reward=1.0):
    words = [f"t{i}" for i in range(len(weights))]
    return {
        "prompt": prompt, "completion": " ".join(words), "solution": "4", "reward": reward,
        "advantage": advantage, "tokens": [f" {w}" for w in words], "token_weights": weights,
    }


SAMPLES = [sample("p-weak", 0.1, [1.0]), sample("p-best", 2.0, [1.2, 0.8, 1.0]),
           sample("p-worst", -2.5, [1.5], reward=0.0), sample("[bold]p-tag", 0.5, [1.0]),
           sample("p-dead", 0.0, [1.0]), sample("p-empty", 1.0, [])]


def test_completions_are_one_row_each(tmp_path):
    write_completions(tmp_path, 30, SAMPLES)
    table = pyarrow.parquet.read_table(tmp_path / "completions" / "step-000030.parquet")
    assert table.to_pylist() == SAMPLES
    write_completions(tmp_path, 60, SAMPLES[:1])
    assert len(list((tmp_path / "completions").iterdir())) == 2


def test_samples_show_the_strongest_advantages_first(capsys):
    print_samples(SAMPLES, 30, most=4)
    shown = capsys.readouterr().out
    order = [shown.index(s) for s in ("p-worst", "p-best", "p-empty", "[bold]p-tag")]
    assert order == sorted(order)  # and text in brackets is no markup
    assert "p-weak" not in shown and "p-dead" not in shown
    for part in ("step 30", "-2.50", "+2.00", "0.00", "1.00", "t0 t1 t2"):
        assert part in shown


def test_token_colours_follow_the_weights(monkeypatch):
    import rich.console

    tables = []
    monkeypatch.setattr(rich.console.Console, "print", lambda self, table: tables.append(table))
    print_samples([sample("p", 1.0, [1.2, 1.0, 0.5, 3.0])], 1)
    (text,) = tables[0].columns[1]._cells
    styles = {text.plain[s.start : s.end].strip(): s.style for s in text.spans}
    assert styles == {
        "t0": "bold rgb(0,107,0)", "t2": "bold rgb(162,0,0)", "t3": "bold rgb(0,255,0)"
    }


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_line(tmp_path, capsys, monkeypatch, terminal):
    with reporter(tmp_path) as report:
        monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
        report.progress(4, {
            "reward": 0.5, "loss": -0.25, "rlsd/effective_lambda": 0.4, "entropy": 1.0,
            "rlsd/active_token_frac": 0.755, "completions/mean_length": 12.3,
        })
        report.progress(5, {"reward": None, "eval/pass@1_greedy": 0.5})
    first, second = capsys.readouterr().out.replace("\r", "\n").strip("\n").split("\n")[-2:]
    first, second = (x.removeprefix("\x1b[2K") for x in (first, second))
    for part in ("step 4/10", "reward 0.500", "loss -0.2500", "lambda 0.40", "live 76%",
                 "length 12", "s/step", "ETA 0:0"):
        assert part in first
    assert "entropy" not in first
    assert "step 5/10" in second and "pass@1_greedy 0.500" in second and "reward" not in second


def test_eta_counts_from_the_resumed_step(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 110.0])
    log_steps(tmp_path, [1, 2, 3, 4])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with reporter(tmp_path, start_step=4) as report:
        report.progress(6, {})  # two steps in 10 s, four to go
    assert "step 6/10  5.00 s/step  ETA 0:20" in capsys.readouterr().out


def test_model_card_has_the_latest_of_each_metric_and_the_setting():
    config = TrainConfig(model_name_or_path="org/base", train_dataset="maths.jsonl", seed=5)
    card = model_card(config, 40, [
        {"step": 0, "eval/pass@1_sampled": 0.1, "eval/pass@1_greedy": 0.2, "reward": 0.5},
        {"step": 40, "eval/pass@1_sampled": 0.75, "eval/pass@1_greedy": None},
    ])
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("| pass@1_sampled | 0.7500 |", "| pass@1_greedy | 0.2000 |", "RLSD checkpoint",
                 "step 40", "`org/base`", "`maths.jsonl`", "lambda 0.5", "eps_w 0.2",
                 "teacher `snapshot`", "learning rate 1e-06", "seed 5", "groups of 8"):
        assert part in card, part
    assert "0.1000" not in card and "reward |" not in card


def front_of(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_model_card_of_adapters_names_their_base_and_peft():
    config = TrainConfig(model_name_or_path="org/base", train_dataset="x", use_peft=True, lora_r=8)
    front, body = front_of(model_card(config, 1, []))
    assert front == {
        "library_name": "peft", "base_model": "org/base",
        "tags": ["rlsd", "rlvr", "reinforcement-learning", "lora"],
    }
    assert "LoRA adapters of rank 8, not a whole model, for the base model `org/base`" in body
    assert "needs peft" in body


def test_model_card_of_a_whole_model(tmp_path):
    config = TrainConfig(model_name_or_path="org/base", train_dataset="x", num_train_epochs=1.5)
    front, body = front_of(model_card(config, 1, []))
    assert (front["library_name"], front["base_model"]) == ("transformers", "org/base")
    assert "lora" not in front["tags"] and "peft" not in body and "\n1.5 epochs planned" in body
    # The Hub refuses what is no id of its own.
    local = TrainConfig(model_name_or_path=str(tmp_path), train_dataset="x", use_peft=True)
    front, body = front_of(model_card(local, 1, []))
    assert "base_model" not in front and f"the base model `{tmp_path}`" in body


class Hub:
    """huggingface_hub.HfApi without a network."""

    made, uploads, broken = [], [], None

    def create_repo(self, name, *, exist_ok):
        assert exist_ok
        if self.broken == "create":
            raise OSError("401 Client Error.\n\nInvalid username or password.")
        self.made.append(name)
        return types.SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        if self.broken == "upload":
            raise ConnectionError("the network is down. Retry later")
        files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*")
                 if p.is_file()]
        kept = [f for f in files if not any(fnmatch(f, p) for p in ignore_patterns)]
        self.uploads.append((repo_id, commit_message, sorted(kept)))


@pytest.fixture
def hub(monkeypatch):
    for name in ("made", "uploads"):
        monkeypatch.setattr(Hub, name, [])
    monkeypatch.setattr(Hub, "broken", None)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


@pytest.mark.parametrize("given, want", [(None, "me/run"), ("org/mine", "org/mine")])
def test_the_repository_is_made_before_the_run(hub, tmp_path, given, want):
    config = TrainConfig(push_to_hub=True, hub_model_id=given, output_dir=str(tmp_path / "run"))
    assert hub_repository(config) == want
    assert hub.made == [given or "run"] and not hub.uploads
    assert hub_repository(dataclasses.replace(config, push_to_hub=False)) is None
    assert len(hub.made) == 1
    hub.broken = "create"
    with pytest.raises(UserError) as error:
        hub_repository(config)
    assert str(error.value) == (
        f"push_to_hub cannot make the repository {given or 'run'} (401 Client Error); log in with "
        "hf auth login, set hub_model_id, or leave push_to_hub out."
    )


def test_a_push_leaves_out_what_only_a_resume_needs(hub, tmp_path, capsys):
    folder = tmp_path / "checkpoint-7"
    (folder / "shards").mkdir(parents=True)
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    for name in [*names, "trainer_state.pt", "SHA256SUMS", "shards/__0_0.distcp"]:
        (folder / name).write_text("x")
    push("me/run", folder)
    assert hub.uploads == [("me/run", "checkpoint-7", names)]
    assert capsys.readouterr().out == f"Pushed {folder} to me/run.\n"
    hub.broken = "upload"
    with pytest.raises(UserError) as error:
        push("me/run", folder)
    assert str(error.value) == (
        f"The run is done and whole in {folder}, but could not be pushed to me/run (the network is "
        f"down); push it with hf upload me/run {folder} --exclude trainer_state.pt."
    )


def test_model_card_of_grpo_claims_no_teacher():
    config = TrainConfig(objective="grpo", model_name_or_path="m", train_dataset="d")
    card = model_card(config, 1, [])
    assert "GRPO checkpoint" in card and "No evaluation was run." in card
    for part in ("lambda", "eps_w", "snapshot", "Self-Distilled RLVR"):
        assert part not in card


@pytest.mark.parametrize("text", [
    '{"reward": 1}', '{"step": "1"}', '{"step": null}', '{"step": 1.5}', '{"step": -1}',
    '{"step": true}', '{"step": 1, "reward": "0.5"}', '{"step": 1, "reward": [1]}',
    '{"step": 1, "reward": {}}', f'{{"step": {"9" * 30}}}', f'{{"step": {"9" * 5000}}}',
    f'{{"step": 1, "reward": {"9" * 400}}}', "[" * 100_000, '{"a":' * 5_000, "[]", "3",
], ids=lambda text: text[:30])
def test_a_line_that_no_run_writes_is_named(text, tmp_path):
    (tmp_path / METRICS).write_text(f'{text}\n{{"step": 2, "reward": 0.5}}\n')
    with pytest.raises(UserError, match=f"^Line 1 of {tmp_path / METRICS} is damaged\\.$"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        plot_runs({"run": [tmp_path]}, tmp_path / "x.png")


def test_values_that_are_not_finite_were_not_measured(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "loss": NaN, "reward": 1e999, "entropy": 2}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "reward": None, "entropy": 2.0}]


def test_the_baseline_is_shown_without_a_time(tmp_path, capsys):
    with reporter(tmp_path) as report:
        report.progress(0, {"eval/pass@1": 0.25, "eval/pass@1_low": 0.1, "eval/pass@1_high": 0.5})
        report.progress(0, {})  # nothing held out
    assert capsys.readouterr().out == "step 0/10  pass@1 0.250 [0.100, 0.500]\n"
