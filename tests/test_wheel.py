"""A built wheel, in a virtual environment of its own, holds every module and runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).parents[1]
USE = """
import importlib, pathlib, pkgutil, sys
import torch, liar_ext
for module in pkgutil.walk_packages(liar_ext.__path__, "liar_ext."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except liar_ext.InputError as error:  # it needs a package that is installed apart
            assert module.name.startswith("liar_ext.integrations."), module.name
            assert "pip install " in str(error), error
        except ModuleNotFoundError as error:  # a kernel in Triton, which no CPU build of torch has
            assert (module.name, error.name) == ("liar_ext.ops.gram_triton", "triton"), error
        print(module.name)
gram = torch.zeros(3, 3, dtype=torch.float64)
liar_ext.ops.gram_update_(gram, gram[0].clone(), gram[0, :2].clone(), torch.ones(5, 3))
assert gram.tril().sum() == 5 * 6, gram
assert pathlib.Path(liar_ext.__file__).is_relative_to(sys.prefix), liar_ext.__file__
"""


def run(*command: str | Path, cwd: Path = ROOT, **more: str) -> str:
    # With this source tree in PYTHONPATH pip would take its egg-info for the package, installed.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment with the wheel in it; torch and transformers are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    run(*wheel, CFLAGS="-O0")  # compiled in half of the time
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but the .pth files there, one of which names this source
    # tree, are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, folder


def test_every_module_imports_from_the_wheel(environment):
    python, folder = environment
    imported = set(run(python, "-I", "-c", USE, cwd=folder).split())
    sources = (ROOT / "liar_ext").rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources}
    wanted = {name.removesuffix(".__init__") for name in names if not name.endswith("__main__")}
    assert wanted - {"liar_ext"} <= imported


def test_the_command_runs_from_the_wheel(environment):
    python, folder = environment
    assert "extension              loaded" in run(python.parent / "liar", "doctor", cwd=folder)


def test_vllm_finds_its_plugin_in_the_wheel(environment):
    python, folder = environment
    find = "from importlib.metadata import entry_points; "
    find += "(found,) = entry_points(group='vllm.general_plugins', name='liar'); "
    find += "print(found.dist.locate_file(''), found.load().__module__)"
    where, module = run(python, "-I", "-c", find, cwd=folder).split()
    assert Path(where).is_relative_to(folder) and module == "liar_ext.integrations.vllm"


def test_the_lines_of_the_readme_run_from_the_wheel(environment):
    """In an environment with the wheel alone: ``make check-readme``."""
    python, folder = environment
    said = run(python, "-I", ROOT / "tests" / "readme.py", folder / "readme", cwd=folder)
    assert said.splitlines()[-1] == "every line of the README runs"
