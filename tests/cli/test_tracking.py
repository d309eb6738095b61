"""``liar prune --log``, with modules in the place of MLflow and Weights & Biases."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from liar_ext import Report, cli
from liar_ext.cli import options
from liar_ext.cli.main import log

REPORT = Report(
    "a model",
    params={"before": 10, "after": 5},
    evaluation={"dense": {"perplexity": 2.5}, "note": "a word"},
    seconds={"total": 1.5},
    recipe={"keep": 0.5},
)
METRICS = {
    "params.before": 10,
    "params.after": 5,
    "evaluation.dense.perplexity": 2.5,
    "seconds.total": 1.5,
}


@pytest.fixture
def tracker(monkeypatch):
    """Put a module of the name of a tracker where it would be imported from."""

    def put(name: str, **functions) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def mlflow(tracker):
    logged = {}

    @contextmanager
    def start_run(run_name):
        logged["run"] = run_name
        yield

    functions = {"log_params": "params", "log_metrics": "metrics"}
    setters = {
        name: lambda facts, at=at: logged.update({at: facts}) for name, at in functions.items()
    }
    tracker("mlflow", start_run=start_run, **setters)
    return logged


def test_mlflow_gets_recipe_and_numbers(mlflow):
    log(REPORT, "mlflow", "out")
    assert mlflow == {"run": "out", "params": {"keep": 0.5}, "metrics": METRICS}


def test_wandb_gets_recipe_and_numbers(tracker):
    logged = []

    @contextmanager
    def init(**settings):
        logged.append(settings)
        yield SimpleNamespace(log=logged.append)

    tracker("wandb", init=init)
    log(REPORT, "wandb", "out")
    assert logged == [{"project": "liar_ext", "name": "out", "config": {"keep": 0.5}}, METRICS]


def test_a_tracker_that_fails_is_a_warning(tracker):
    tracker("mlflow")
    with pytest.warns(UserWarning, match="--log mlflow: nothing was logged: module 'mlflow' has"):
        log(REPORT, "mlflow", "out")


def test_the_command_logs(mlflow, llama_folder, corpus, tmp_path):
    out = str(tmp_path / "out")
    job = ["prune", str(llama_folder), "--calibration", str(corpus[0]), "--preset", "fast"]
    job += ["--samples", "8", "--seq-len", "16", "--quiet", "--out", out]
    assert cli.main([*job, "--log", "mlflow"]) == 0
    assert mlflow["run"] == out and mlflow["params"]["samples"] == 8
    assert mlflow["metrics"]["params.after"] < mlflow["metrics"]["params.before"]


def test_a_tracker_that_is_missing_is_refused_first(monkeypatch, capsys):
    monkeypatch.setattr(options, "find_spec", lambda _: None)
    for name, said in (
        ("wandb", "pip install wandb"),
        ("other", "--log must be one of mlflow, wandb, got 'other'"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["prune", "m", "--calibration", "t", "--out", "o", "--log", name])
        assert stop.value.code == 2 and said in capsys.readouterr().err
