"""The workflow of GitHub Actions: its jobs run what a developer runs, on every Python allowed."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOBS = WORKFLOW["jobs"]


def commands(job):
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_every_job_is_whole():
    assert set(JOBS) == {"lint", "test", "wheel", "wheel-cuda"}
    assert set(WORKFLOW[True]) == {"push", "pull_request"}  # `on` is true to YAML
    for name, job in JOBS.items():
        assert job["runs-on"] and job["steps"][0]["uses"].startswith("actions/checkout@"), name
        assert commands(name), name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/x@v1")), step


def test_it_tests_every_python_that_the_package_allows():
    project = (ROOT / "pyproject.toml").read_text()
    low, high = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project).groups()
    versions = [f"3.{minor}" for minor in range(int(low), int(high))]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == versions
    assert re.findall(r"Python :: (3\.\d+)", project) == versions
    assert "${{ matrix.python }}" in str(JOBS["test"]["steps"])


def test_its_commands_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert commands("test") == ["make test"] and "test" in targets
    script = ROOT / commands("wheel")[0]
    assert script.stat().st_mode & 0o111 and "-m build" in script.read_text()
    # One wheel without the extension, and one that fails where the extension does not compile.
    assert "RLSD_BUILD_CUDA=0" in script.read_text()
    build = next(step for step in JOBS["wheel-cuda"]["steps"] if "pip wheel" in step.get("run", ""))
    assert build["env"]["RLSD_BUILD_CUDA"] == "1" and "--no-build-isolation" in build["run"]
