from __future__ import annotations

import numpy
import pytest

from liar_ext import Budget, InputError, Plan
from liar_ext.models.plan import SitePlan


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan"), "0.8", None, [0.8]])
def test_keep_outside_its_range(keep):
    with pytest.raises(InputError, match=r"keep must be in \(0, 1\]"):
        Budget(keep)


@pytest.mark.parametrize("field", ["tile", "seq_len"])
def test_other_fields_outside_their_range(field):
    for wrong in (0, 1.5, "8", None, True):
        with pytest.raises(InputError, match=field):
            Budget(0.5, **{field: wrong})
    with pytest.raises(InputError, match="of must be one of prunable, params, flops, kv_cache"):
        Budget(0.5, of="seconds")


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0), (-1, 2), (3, 4), (0.5, 1.5), (True,)])
def test_site_plan_wants_ascending_units(kept):
    with pytest.raises(InputError, match="ascending indices in"):
        SitePlan(4, kept)


def test_plan_round_trips(tmp_path):
    plan = Plan("llama", "kv_group", {"0.mlp": SitePlan(4, (0, 3), bias=True)}, {"keep": 0.5})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.sites["0.mlp"].removed == (1, 2)


def test_plan_of_hidden_features_round_trips():
    plan = Plan("llama", "kv_group", {}, hidden=SitePlan(6, (0, 2, 5)))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.hidden.removed == (1, 3, 4)


def test_a_plan_of_version_1_is_one_without_hidden_features():
    site = '{"units": 4, "kept": [0, 3], "bias": false}'
    text = '{"version": 1, "model_type": "llama", "attn_unit": "head", "sites": {"0.mlp": %s}}'
    assert Plan.from_json(text % site) == Plan("llama", "head", {"0.mlp": SitePlan(4, (0, 3))})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 99}', '{"version": 2}', "[" * 99999, "9" * 5000]
)
def test_what_is_not_a_plan(text):
    with pytest.raises(InputError, match="Plan: "):
        Plan.from_json(text)


@pytest.mark.parametrize("tile", [0, -8, 1.5, "32", "all", True, None, 2**63, [8]])
def test_a_tile_is_a_number_or_auto(tile):
    with pytest.raises(InputError, match='tile must be an integer of at least 1 or "auto"'):
        Budget(0.5, tile=tile)


def test_a_tile_of_numpy_is_a_number():
    assert Budget(0.5).tile == "auto" and type(Budget(0.5, tile=numpy.int64(8)).tile) is int


@pytest.mark.parametrize("order", [1, -1])
def test_a_plan_of_mlps_alone_goes_with_any_unit_of_attention(order):
    heads = Plan("bert", "head", {"0.attn": SitePlan(4, (0, 2))})
    channels = Plan("bert", "kv_group", {"0.mlp": SitePlan(8, (1, 2, 5))})
    first, second = (heads, channels)[::order]
    both = second.after(first)
    assert both.attn_unit == "head" and both.sites == {**heads.sites, **channels.sites}
    with pytest.raises(InputError, match="one attention unit"):
        Plan("bert", "kv_group", {"0.attn": SitePlan(2, (0,))}).after(heads)
