"""The end-to-end benchmark: its table, what it runs and what it keeps; tiny runs of both kinds."""

import json
import subprocess
import sys

import pytest

from bench import bench_end_to_end as bench
from rlsd.demo import save_model, tiny_model, word_tokenizer
from rlsd.tasks.worked import worked_rows

CHAT = """{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"""


def found(step, reward):
    return {
        "seconds": [50.0, step, step, step + 2], "cpu_seconds": [90.0, 3.0, 3.0, 4.0],
        "rollout": [20.0, 1.0, 1.0, 1.0], "peak_mib": 2048.0, "reward": reward,
        "mean_length": [10.0, 12.0, 12.0, 10.0],
        "about": {"cpu": "a processor", "threads": 1, "cores": 2, "load_before": 0.25,
                  "versions": {"torch": "2"}},
    }


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def called(monkeypatch):
    """Arms that the benchmark starts; they are not run."""
    started = []

    def run(command, **_):
        (name,) = (a.removeprefix("--arm=") for a in command if a.startswith("--arm="))
        started.append(name)
        out = json.dumps(found(8.0 if "TRL" in name else 4.0, [0.25, 0.5, 0.5, 0.75]))
        return subprocess.CompletedProcess(command, int("tolerance" in name), out)

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "plot", lambda *_: None)
    return started


def run(monkeypatch, out, *options):
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "model", "--out", str(out), *options])
    bench.main()


def test_an_arm_that_is_done_is_not_run_again(called, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--only", "hook", "grpotrainer")
    trl = ["TRL GRPOTrainer", "TRL hook, lambda 0", "TRL hook, RLSD"]
    assert called == trl
    with pytest.raises(SystemExit, match="tolerance 1e-3 failed; what is done stays in"):
        run(monkeypatch, tmp_path)
    assert called == list(bench.ARMS)
    results = json.loads((tmp_path / "end_to_end.json").read_text())
    assert list(results["arms"]) == list(bench.ARMS)[:-1]
    with pytest.raises(SystemExit, match="other settings .*'steps': 20.*name another --out"):
        run(monkeypatch, tmp_path, "--steps", "2")
    head, *rows = [cells(x) for x in (tmp_path / "end_to_end.md").read_text().splitlines()[4:]]
    table = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows[1:]}
    assert table["TRL hook, RLSD"] == {
        "s per step": "8.0", "p20 to p80": "8.0 to 10.0", "x of TRL": "1.00", "rollout": "1.0",
        "update": "7.0", "processor s": "3.0", "peak MiB": "2048", "reward, first quarter": "0.25",
        "last quarter": "0.75", "mean tokens": "11.0", "load": "0.2",
    }
    assert table["rlsd train, RLSD"]["x of TRL"] == "0.50"
    assert list(table) == list(bench.ARMS)[:-1]


def test_the_plot_shows_every_arm(tmp_path):
    pytest.importorskip("matplotlib")
    arms = {name: found(4.0, [0.25, 0.5, 0.5, 0.75]) for name in bench.ARMS}
    bench.plot({"arms": arms}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["TRL GRPOTrainer", "TRL hook, RLSD", "rlsd train, RLSD"])
def test_an_arm_runs(arm, tmp_path):
    pytest.importorskip("trl")
    texts = (message["content"] for row in worked_rows("add3", 20, 0) for message in row["prompt"])
    words = {word for text in texts for word in text.split()} | {"system", "user", "assistant"}
    tokenizer = word_tokenizer(sorted(words))
    tokenizer.chat_template = CHAT
    model = tiny_model(len(tokenizer), seed=0, hidden=16, layers=1, positions=256)
    save_model(model, tokenizer, tmp_path / "model")
    settings = {
        "steps": 2, "rows": 20, "batch": 8, "num_generations": 4, "max_completion_length": 4,
        "per_device_train_batch_size": 4, "seed": 0,
    }
    got = bench.run_arm(arm, tmp_path / "model", settings)
    for name in ("seconds", "cpu_seconds", "rollout", "reward", "mean_length"):
        assert len(got[name]) == 2, name
    assert all(0 < r < s for r, s in zip(got["rollout"], got["seconds"], strict=True))
    assert got["peak_mib"] > 100 and 0 < got["mean_length"][0] <= 4
