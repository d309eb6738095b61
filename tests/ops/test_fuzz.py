"""Random calls of every operator: what agrees with the oracle agrees, what is spoilt is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz
import fuzz_calls
import pytest
import torch
from fuzz_calls import RandomChoices
from fuzz_checks import Wrong, check_call, make_call
from fuzz_spoilers import SPOILERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liar_ext import ops

FUZZ = Path(fuzz.__file__)
IN_PLACE = ("gram_update_",)
ONLY_FOR = {
    "strides": (*IN_PLACE, "reconstruct"),
    "expanded": IN_PLACE,
    "overlap": IN_PLACE,
    "index": ("reconstruct",),
    "number": ("obs_curve", "reconstruct"),
}


class DrawnChoices:
    """Choices that hypothesis draws, and shrinks when a call is wrong."""

    def __init__(self, data):
        self._draw = data.draw

    def integer(self, low, high):
        return self._draw(st.integers(low, high))

    def pick(self, options):
        return self._draw(st.sampled_from(options))


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", fuzz.OPERATORS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_a_call_agrees_with_the_oracle_or_is_refused(operator, data):
    choices = DrawnChoices(data)
    check_call(make_call(choices, operator), choices)


@pytest.mark.parametrize("operator", fuzz.OPERATORS)
@pytest.mark.parametrize("way", SPOILERS, ids=lambda way: way.__name__)
def test_every_way_to_spoil_a_call_is_refused(operator, way):
    """Hypothesis may leave one out; here each is tried where the operator has what it spoils."""
    tried = 0
    for seed in range(30):
        choices = RandomChoices((way.__name__, operator, seed))
        call = getattr(fuzz_calls, operator)(choices)
        if way(choices, call):
            call.spoilt, tried = way.__name__, tried + 1
            assert check_call(call, choices) == "refused"
    assert (tried > 0) == (operator in ONLY_FOR.get(way.__name__, fuzz.OPERATORS))


def broken(result, by):
    return tuple(by(r) for r in result) if isinstance(result, tuple) else by(result)


def noticed(operator, of=60):
    """How many calls the checks say are wrong; empty ones can't be."""
    count = 0
    for seed in range(of):
        choices = RandomChoices(seed)
        try:
            check_call(getattr(fuzz_calls, operator)(choices), choices)
        except Wrong:
            count += 1
    return count


def test_an_error_that_rounded_sums_take_below_zero_may_be_zero():
    """The operator says 0; the oracle subtracts what float32 has left of a Gram matrix."""
    gram = torch.tensor([[1.0, 1 / 3], [1 / 3, 1 / 9]])
    given = {"weight": 1e3 * torch.ones(1, 2), "gram": gram, "kept": torch.tensor([0])}
    given |= {"damps": torch.tensor([1e-12], dtype=torch.float64), "errors_only": False}
    assert check_call(fuzz_calls.Call("reconstruct", given), RandomChoices(0)) == "agreed"


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", ["obs_curve", "reconstruct"])
def test_a_wrong_result_is_noticed(operator, monkeypatch):
    right = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda **a: broken(right(**a), lambda r: r + 1))
    assert noticed(operator) > 30


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", IN_PLACE)
def test_a_sum_left_out_is_noticed(operator, monkeypatch):
    monkeypatch.setattr(ops, operator, lambda **a: None)
    assert noticed(operator) > 25


@pytest.mark.exhaustive
def test_the_command_prints_one_line_of_counts(tmp_path):
    command = [sys.executable, str(FUZZ), "--calls", "60", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout)
    assert counts["tried"] == counts["survived"] == counts["agreed"] + counts["refused"] == 60
    assert counts["wrong"] == counts["tracebacks"] == counts["crashed"] == 0


@pytest.mark.exhaustive
def test_the_command_counts_a_crash_and_goes_on(tmp_path):
    """A process that dies loses the call that it died in, and no other."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '--work' in sys.argv:\n"
        "    import fuzz_checks\n"
        "    right = fuzz_checks.make_call\n"
        "    def make_call(choices, operator):\n"
        "        call = right(choices, operator)\n"
        "        if operator == 'obs_curve':\n"
        "            os.abort()\n"
        "        return call\n"
        "    fuzz_checks.make_call = make_call\n"
    )
    places = tmp_path, FUZZ.parent, FUZZ.parents[1], os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(map(str, places))
    result = subprocess.run(
        [sys.executable, str(FUZZ), "--calls", "6"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    counts = json.loads(result.stdout)
    assert (counts["tried"], counts["survived"], counts["crashed"]) == (6, 4, 2)


def test_every_operator_is_called():
    registered = {name for name in fuzz.OPERATORS if hasattr(torch.ops.liar_ext, name)}
    assert registered == set(ops.__all__) - {"build_info"} == set(fuzz.OPERATORS)
