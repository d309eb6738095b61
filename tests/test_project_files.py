"""CITATION.cff, the Dockerfile, and the recipes of docs/howto/pipelines.md."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from test_docs import FENCE, ROOT, parses

PIPELINES = (ROOT / "docs" / "howto" / "pipelines.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def recipe(title: str) -> str:
    """Return the first block below a heading of the page."""
    return FENCE.search(PIPELINES.split(f"### {title}\n")[1])[3]


def no_docker() -> str:
    """Return why no image can be built here, or nothing."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    done = subprocess.run(["docker", "info"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"docker does not answer: {done.stderr[-200:]}"


def test_the_citation_is_of_this_version_and_names_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for field in ("version", "license"):
        assert f'\n{field} = "{cited[field]}"\n' in project
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["references"][0]["url"] == "https://arxiv.org/abs/2407.13331"


def test_the_image_has_what_the_wheel_is_built_from():
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in allowed if line.startswith("!")} == names
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r"^requires = \[(.*)\]$", project, re.MULTILINE)[1]
    for package in re.findall(r'"([a-z]+)', needed):
        assert re.search(rf"pip install .*{package}\b", DOCKERFILE.replace("\\\n", "")), package
    for extra in re.search(r"ARG EXTRAS=(\S+)", DOCKERFILE)[1].split(","):
        assert f"\n{extra} = [" in project


@pytest.mark.exhaustive
def test_the_image_builds_and_runs():
    if reason := no_docker():
        pytest.skip(reason)
    subprocess.run(["docker", "build", "-q", "-t", "liar-test", str(ROOT)], check=True)
    try:
        subprocess.run(["docker", "run", "--rm", "liar-test"], check=True)
    finally:
        subprocess.run(["docker", "rmi", "-f", "liar-test"], capture_output=True)


def test_recipes_are_of_their_formats():
    actions = yaml.safe_load(recipe("GitHub Actions"))
    steps = [step.get("run", step.get("uses")) for step in actions["jobs"]["prune"]["steps"]]
    assert [step.split("@")[0] for step in steps if "cache" in step] == [
        "actions/cache/restore",
        "actions/cache/save",
    ]
    job = yaml.safe_load(recipe("Kubernetes"))["spec"]
    pod = job["template"]["spec"]
    mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never"  # which a policy for failures of pods asks for
    done = subprocess.run(["bash", "-n"], input=recipe("Slurm"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_start_has_the_same_checkpoint():
    lines = re.findall(r"liar (prune MODEL .*)", PIPELINES)
    assert len(lines) == 4 and set(lines) == {lines[0]} and "--checkpoint ckpt" in lines[0]
    parses(f"liar {lines[0]}")
