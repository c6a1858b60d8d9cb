"""The README quotes committed results, names files that exist, and its snippets run."""

import re
from pathlib import Path

import pytest
from bare_install import snippets, snippets_agree

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("run", ["demo", "demo_warmup300"])
def test_tables_are_the_committed_ones(run):
    table = (ROOT / f"bench/results/{run}/table.txt").read_text(encoding="utf-8")
    assert table.strip() in README


def test_claimed_step_is_the_tables():
    table = (ROOT / "bench/results/demo/table.txt").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if re.match(r"RLSD +\d", line))
    reached = re.search(r"(\d+) +\d\.\d{3} +\d\.\d{3} +[\d.]+$", row)[1]
    assert f"GRPO's final accuracy in {reached} of 80 steps" in README


def test_differences_are_those_of_the_study():
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    quoted = re.findall(r"[+-]0\.\d{3} \+- 0\.\d{3}", README.replace("\n", " "))
    assert len(quoted) == 4 and [q for q in quoted if q not in results] == []


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_file_tree_names_files_that_exist():
    tree = next(block for block in snippets(README, "") if "rlsd_kernels/ " in block)
    named, folders = [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        if folder := re.match(r" *(\w+/)", line):
            folders[depth:] = [folder[1]]
        named += ["".join(folders[:depth]) + name for name in re.findall(r"\b\w+\.py\b", line)]
    assert len(named) == len(set(named))
    files = {str(p.relative_to(ROOT)) for folder in ("rlsd_kernels", "rlsd", "bench", "examples")
             for p in (ROOT / folder).rglob("*.py") if p.name != "__init__.py"}
    assert set(named) == files


def test_snippets_agree():
    snippets_agree(README)
