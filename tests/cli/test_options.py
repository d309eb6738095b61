"""The options of ``liar prune`` are the fields of a recipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import liar_ext
from liar_ext import Recipe, cli
from liar_ext.calibration import texts
from liar_ext.cli.main import parse, parser
from liar_ext.cli.options import recipe_of
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.models.recipe_fields import GROUPS, option_of, recipe_fields
from liar_ext.selection.criteria import _CRITERIA
from liar_ext.system.environment import child, is_command
from liar_ext.system.errors import InputError

# One text for each field, other than the default, and what the recipe then holds.
GIVEN = {
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cuda:1", "cuda:1"),
    "calibration": ("other.txt", ("other.txt",)),
    "samples": ("16", 16),
    "self_text": ("0.5", 0.5),
    "random_tokens": ("0.5", 0.5),
    "seq_len": ("32", 32),
    "batch_size": ("2", 2),
    "seed": ("7", 7),
    "memory": ("1.5GiB", 3 << 29),
    "keep": ("0.5", 0.5),
    "of": ("flops", "flops"),
    "latency_phase": ("decode", "decode"),
    "latency_batch": ("8", 8),
    "latency_prompt": ("512", 512),
    "latency_new_tokens": ("64", 64),
    "tile": ("64", 64),
    "uniform_layers": (None, True),
    "keep_hidden": ("0.9", 0.9),
    "keep_blocks": ("0.75", 0.75),
    "keep_experts": ("48", 48),
    "keep_vocab": ("32k", 32768),
    "kinds": ("mlp", ("mlp",)),
    "attn_unit": ("head", "head"),
    "criterion": ("obs", "obs"),
    "allocation": ("uniform", "uniform"),
    "reconstruct": ("affine", "affine"),
    "damp": ("1e-3", 1e-3),
    "schedule": ("layerwise", "layerwise"),
    "rescale": ("", True),
    "eval": ("held_out.txt", "held_out.txt"),
    "eval_samples": ("5", 5),
    "certify": ("4", 4),
}
NEED_OTHERS = {"model", "latency_table", "vocab_text", "vocab_scripts"}  # see below
JOB = ("prune", "model", "--calibration", "text.txt")


@pytest.fixture
def job(llama_folder, corpus):
    """Run a small job with some options more, and return what it reports."""

    def run(out: Path, *more: str) -> dict:
        command = ["prune", str(llama_folder), "--calibration", str(corpus[0]), "--seq-len", "16"]
        command += ["--samples", "8", "--keep", "0.7", "--out", str(out), *more]
        assert cli.main(command) == 0
        return json.loads((out / "liar/report.json").read_text())

    return run


def read(*arguments: str) -> Recipe:
    return recipe_of(parse([*JOB, *arguments]))


def test_no_options_are_the_default_recipe():
    assert read() == Recipe(model="model", calibration=("text.txt",))


def test_every_field_is_tried():
    assert GIVEN.keys() | NEED_OTHERS == {each.name for each in recipe_fields()}


@pytest.mark.parametrize("each", [each for each in recipe_fields() if each.name in GIVEN])
def test_every_field_has_an_option(each):
    text, value = GIVEN[each.name]
    option, needs = option_of(each), each.metadata["needs"].split()
    needed = dict([needs] if needs else [])
    others = [f"--{needs[0]}", needs[1]] if needs else []
    recipe = read(option, *([text] if text else []), *others)
    assert getattr(recipe, each.name) == value != each.default
    facts = {"model": "model", "calibration": ("text.txt",), each.name: value}
    assert recipe == Recipe(**facts, **needed)
    if needed:
        with pytest.raises(InputError, match=f"{option} says nothing without {others[0]}"):
            read(option, text)


def test_fields_that_need_others_have_options_too():
    assert read("--of", "latency", "--latency-table", "a.json").latency_table == "a.json"
    assert read("--keep-vocab", "0.5", "--vocab-text", "a", "b").vocab_text == ("a", "b")
    scripts = read("--keep-vocab", "auto", "--vocab-scripts", "latin,greek").vocab_scripts
    assert scripts == ("latin", "greek")
    assert recipe_of(parse(["prune", "here"])).model == "here"
    assert recipe_of(parse(["prune", "--keep", "0.7", "here"])).model == "here"
    assert recipe_of(parse(["prune", "--calibration", "a", "--keep", "0.7", "m"])).model == "m"


def test_options_override_a_recipe(tmp_path):
    path = str(tmp_path / "recipe.yaml")
    Recipe(model="there", keep=0.5, uniform_layers=True, calibration=("a",)).save(path)
    assert recipe_of(parse(["prune", "--recipe", path])) == Recipe.load(path)
    over = ["--keep", "0.8", "--no-uniform-layers"]
    assert recipe_of(parse(["prune", "--recipe", path, *over])) == Recipe(
        model="there", calibration=("a",)
    )
    assert recipe_of(parse(["prune", "--recipe", path, "here"])).model == "here"


def test_options_override_a_preset():
    assert read("--preset", "best").rescale
    assert read("--preset", "best", "--no-rescale") == read()


def test_a_preset_and_a_recipe_are_refused_together(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["prune", "--preset", "fast", "--recipe", "x"])
    assert stop.value.code == 2 and "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune", "calibrate", "sweep"])
def test_help_shows_the_common_options_on_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 48 and f"\nExample: liar {command} " in shown
    own = {*re.findall(r"^  (?:-\w, |-\w \w+, )?(--[\w-]+|MODEL)", shown, re.M)}
    assert {"MODEL", "--calibration", "--help-all"} < own and len(own) <= 12
    common = {option_of(each) for each in recipe_fields(common=True)}
    assert {option_of(each) for each in recipe_fields()} & own <= common


def test_all_help_groups_the_options_by_stage(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["prune", "--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Three arguments are enough" in " ".join(shown.split())
    places = [shown.index(f"\n{title}:\n") for title in GROUPS.values()]
    assert places == sorted(places)
    for each in recipe_fields():
        if each.name != "model":
            assert option_of(each) in shown


def test_every_subcommand_has_help(capsys):
    for command in ("prune", "eval", "verify", "doctor"):
        with pytest.raises(SystemExit) as stop:
            parser().parse_args([command, "--help"])
        assert stop.value.code == 0 and f"liar {command}" in capsys.readouterr().out


def test_a_passive_wait_policy():
    """The policy must be there before torch loads OpenMP, which shows it when it is asked to."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    environment.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, "-m", "liar_ext", "families"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("family ")
    shown = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert all(line.endswith("= '0'") for line in shown), shown
    assert shown or sys.platform != "linux"


@pytest.mark.parametrize(
    ("name", "policy", "found"),
    [("other", None, "None"), ("liar", None, "passive"), ("liar", "active", "active")],
)
def test_only_the_command_sets_a_policy_and_only_where_none_is(name, policy, found):
    code = "import os, sys; sys.argv[0] = sys.argv[1]; import liar_ext\n"
    code += "print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {key: os.environ[key] for key in os.environ if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == found


def test_what_is_the_command():
    assert is_command(["/env/bin/liar", "families"], [])
    assert is_command(["liar.exe"], [])
    assert is_command(["-m"], ["python", "-X", "dev", "-m", "liar_ext", "families"])
    assert not is_command(["-m"], ["python", "-m", "pytest", "liar_ext"])
    assert not is_command(["-c"], ["python", "-c", "..."])
    assert not is_command(["liar.py"], []) and not is_command([""], []) and not is_command([], [])


def test_a_child_imports_nothing_of_the_current_folder_nor_of_its_own(tmp_path, monkeypatch):
    for name in ("json", "runpy", "numpy", "beside"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util, json, sys, numpy\n"
        "print(json.dumps([sys.argv[1:], importlib.util.find_spec('beside') is None]))\n"
    )
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(child(script, "a", 1), capture_output=True, text=True)
    assert done.stdout == '[["a", "1"], true]\n', done.stderr


def test_an_interrupt_while_modules_are_imported_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "liar").write_text("from liar_ext.cli import main; main()")
    paths = os.pathsep.join([str(tmp_path), str(Path(liar_ext.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, str(tmp_path / "liar"), "families"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def test_children_are_started_in_one_place_only():
    package = Path(liar_ext.__file__).parent
    starting = [path for path in package.rglob("*.py") if "sys.executable" in path.read_text()]
    assert [path.name for path in starting] == ["environment.py"]


def test_a_run_is_repeated_by_its_recipe(llama_folder, corpus, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--keep", "0.7", "--samples", "8", "--seq-len", "16", "--batch-size", "2"]
    texts = ["--calibration", str(corpus[0]), "--eval", str(corpus[1])]
    assert cli.main(["prune", str(llama_folder), *texts, *options, "--out", str(first)]) == 0
    said = capsys.readouterr().out
    recipe = first / "liar" / "recipe.yaml"
    assert cli.main(["prune", "--recipe", str(recipe), "--quiet", "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (again / "liar" / "recipe.yaml").read_text() == recipe.read_text()
    report = json.loads((first / "liar/report.json").read_text())
    assert report["recipe"]["model"] == str(llama_folder)
    assert "prunable parameters" in said and "from_pretrained(" in said


def test_certified_errors_are_of_sequences_that_no_decision_sees(job, tmp_path, capsys):
    report = job(tmp_path / "certified", "--certify", "4")
    assert "certified divergence" in capsys.readouterr().out
    assert report["evaluation"]["certified"]["rows"] == 4 * 16
    assert all(site["certified_error"] >= 0 for site in report["sites"])
    assert report["recipe"]["certify"] == 4
    assert report["settings"]["calibration_sequences"] == 8 + 3  # written
    job(tmp_path / "plain")
    assert "ertified" not in (tmp_path / "plain/liar/report.md").read_text()


def test_auto_is_judged_on_sequences_of_their_own(job, tmp_path, capsys):
    out, again = tmp_path / "auto", tmp_path / "again"
    report = job(out)
    assert "; divergence on held-out text: " in capsys.readouterr().out
    assert sorted(report["settings"]["schedules"]) == ["layerwise", "one-pass"]
    assert report["settings"]["calibration_sequences"] == 8 + 3  # written
    recipe = str(out / "liar/recipe.yaml")
    assert cli.main(["prune", "--recipe", recipe, "--out", str(again)]) == 0
    same = [(each / "model.safetensors").read_bytes() for each in (out, again)]
    assert same[0] == same[1]


def test_a_text_too_short_to_judge_by_is_told(job, tmp_path, monkeypatch):
    draw = texts.calibration_sequences

    def short(*given, **settings):
        if settings.get("judge"):
            raise InputError("calibration: the text is too short")
        return draw(*given, **settings)

    monkeypatch.setattr(texts, "calibration_sequences", short)
    report = job(tmp_path / "out")
    assert "schedules" not in report["settings"]
    assert any("too short to measure --schedule auto" in each for each in report["warnings"])


def test_the_report_is_written_once(job, tmp_path, monkeypatch):
    from liar_ext import Report

    saved, save = [], Report.save
    monkeypatch.setattr(Report, "save", lambda *args: (saved.append(args[1]), save(*args)))
    job(tmp_path / "out")
    assert len(saved) == 1 and saved[0] != tmp_path / "out"


@pytest.mark.parametrize("text", ["auto", "1", "7", "256"])
def test_tiles(text):
    value = text if text == "auto" else int(text)
    assert read("--tile", text) == read() if text == "auto" else read("--tile", text).tile == value


@pytest.mark.parametrize(("text", "value"), [("0.75", 0.75), ("1", 1.0), ("2", 2)])
def test_experts_are_a_fraction_or_a_number(text, value):
    found = read("--keep-experts", text).keep_experts
    assert found == value and type(found) is type(value)


def test_other_tiles_are_refused():
    with pytest.raises(InputError, match="tile must be an integer .* got 'x'"):
        read("--tile", "x")


@pytest.mark.parametrize(
    ("line", "code"),
    [("--version", 0), ("--help", 0), ("prnue", 2), ("prune m --keeep 0.5", 2)],
)
def test_torch_is_imported_for_a_job_alone(line, code):
    command = [sys.executable, "-X", "importtime", "-m", "liar_ext", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert done.returncode == code and "liar_ext.cli.options" in imported
    assert not {"torch", "transformers", "numpy"} & imported


def test_the_help_names_all_criteria():
    assert _CRITERIA.keys() == CRITERIA.keys()


def test_the_table_says_what_each_criterion_is_registered_with():
    """The command reads the table before the criteria are imported, which write into it."""
    code = (
        "from liar_ext.models.recipe_checks import CRITERIA; table = dict(CRITERIA)\n"
        "import liar_ext.selection.criteria\n"
        "assert table == CRITERIA, (table, CRITERIA)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
