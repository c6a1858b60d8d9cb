"""docs/training.md explains every metric that a run can log, and names options that exist."""

import dataclasses
import re
from pathlib import Path

import pytest
from runs import make_trainer, quick  # noqa: F401

from rlsd import TrainConfig
from rlsd.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs/training.md").read_text(encoding="utf-8")
OPTIONS = {f.name for f in dataclasses.fields(TrainConfig)}


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCS, flags=re.DOTALL | re.MULTILINE)[1]


def rows(text):
    """Cells of every table row, headers left out."""
    lines = [line[1:-1].split(" |") for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [line for line in cells if not line[0].isalpha()]


def spans(cell):
    return re.findall(r"`([^`]+)`", cell)


def general(key):
    """A key with what a run names replaced: rewards/sum_reward/mean is rewards/<function>/mean."""
    key = re.sub(r"^rewards/[^/]+/", "rewards/<function>/", key)
    return re.sub(r"pass@\d+_", "pass@<k>_", key)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Every key that runs with everything switched on have logged."""
    folder = tmp_path_factory.mktemp("runs")
    everything = {
        "beta": 0.1, "num_generations_eval": 2, "leak_markers": ["1"], "validate_every": 1,
        "eval_steps": 1, "vllm_importance_sampling_correction": True,
    }
    trainer = make_trainer(folder, **everything)
    trainer.peak_flops = 1e12  # as on a GPU with a data sheet
    keys = {key for record in trainer.train() for key in record}
    contrasting = make_trainer(folder, output_dir=str(folder / "rlcsd"), objective="rlcsd")
    keys |= contrasting.train_step(1)[0].keys()
    return {general(key) for key in keys}


def test_objectives_stand_as_in_their_table():
    listed = {spans(cells[0])[0]: cells[1:] for cells in rows(section("Objectives"))}
    said = {True: "yes", False: "no"}
    assert listed == {
        name: [row.summary, row.teacher_reads or "", said[row.distils], said[row.policy_gradient]]
        for name, row in OBJECTIVES.items()
    }


def test_every_metric_is_explained_and_nothing_else(logged):
    described = [key for cells in rows(section("Every metric")) for key in spans(cells[0])]
    assert len(described) == len(set(described))
    assert set(described) == logged


def test_symptoms_name_metrics_that_are_explained(logged):
    table = rows(section("When it goes wrong"))
    assert len(table) > 15 and all(len(cells) == 3 for cells in table)
    named = {general(name) for cells in table for name in spans(cells[0])}
    assert {name.replace("pass@1", "pass@<k>") for name in named} - logged <= OPTIONS
    watched = {general(name) for name in spans(section("What to watch"))}
    assert {name for name in watched if "." not in name} <= logged


def test_advice_names_options_that_exist():
    commands = {"rlsd validate", "--logprobs-mode processed_logprobs", "soft_overlong_punishment",
                "privileged_context"}
    named = {name for cells in rows(section("When it goes wrong")) for name in spans(cells[2])}
    assert named - commands <= OPTIONS and len(named) > 20
    given = {*re.findall(r"`(\w+): ", DOCS), *re.findall(r"--(\w+_\w+)", DOCS)}
    others = {"resume_from_checkpoint", "config_file"}  # of the command, and of accelerate
    assert given - OPTIONS == others and len(given) > 5


def test_links_lead_to_files_and_every_config_is_listed():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", DOCS) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    listed = {Path(link).name for link in links if link.endswith(".yaml")}
    assert listed == {path.name for path in (ROOT / "configs").rglob("*.yaml")}
