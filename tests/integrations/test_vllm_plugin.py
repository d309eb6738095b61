"""The plug-in of vLLM, without vLLM: ``make check-vllm`` runs it there.

``FakeRegistry`` has what the plug-in uses of vLLM's registry (0.32): ``models``, a dict from
architecture to an entry with ``load_model_cls()``, and ``register_model(architecture, NAME)``,
which replaces the entry by one that imports ``NAME``, as MODULE:ATTRIBUTE, when it is needed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
from integrations.check_vllm import grouped

from liar_ext.integrations import vllm as plugin


class Own:
    """Stands for a model class of vLLM."""


class FakeRegistry:
    def __init__(self, *architectures):
        entry = SimpleNamespace(load_model_cls=lambda: Own)
        self.models = dict.fromkeys(architectures, entry)

    def register_model(self, architecture, name):
        module, _, attribute = name.partition(":")
        load = lambda: getattr(importlib.import_module(module), attribute)  # noqa: E731
        self.models[architecture] = SimpleNamespace(load_model_cls=load)


@pytest.fixture
def install(monkeypatch):
    """Return what puts a registry where vLLM has its own; nothing else of vLLM is there."""
    monkeypatch.setattr(plugin, "_before", {})
    plugin._model_class.cache_clear()

    def put(registry):
        fake = SimpleNamespace(ModelRegistry=registry, __version__="1.2.3")
        monkeypatch.setitem(sys.modules, "vllm", fake)
        return registry

    yield put
    plugin._model_class.cache_clear()


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vLLM can't be imported.*install vllm"):
        plugin.register()


def test_only_what_vllm_knows_is_replaced(install):
    registry = install(FakeRegistry("LlamaForCausalLM", "Qwen3ForCausalLM", "OPTForCausalLM"))
    others = registry.models["OPTForCausalLM"]
    plugin.register()
    assert set(registry.models) == {"LlamaForCausalLM", "Qwen3ForCausalLM", "OPTForCausalLM"}
    assert registry.models["OPTForCausalLM"] is others
    assert set(plugin._before) == {"LlamaForCausalLM", "Qwen3ForCausalLM"}


def test_registering_again_keeps_what_vllm_had(install):
    registry = install(FakeRegistry("LlamaForCausalLM"))
    before = registry.models["LlamaForCausalLM"]
    for _ in range(2):
        plugin.register()
    assert plugin._before == {"LlamaForCausalLM": before}
    assert registry.models["LlamaForCausalLM"] is not before


def test_a_vllm_that_moved_its_models_keeps_its_own_class(install, caplog):
    """No vllm.model_executor here: the class is vLLM's, and one line tells why."""
    registry = install(FakeRegistry("LlamaForCausalLM", "SmolLM3ForCausalLM"))
    plugin.register()
    with caplog.at_level(logging.WARNING, "vllm.liar_ext"):
        classes = [entry.load_model_cls() for entry in registry.models.values()]
    assert classes == [Own, Own]
    assert len(caplog.records) == 2
    message = caplog.records[0].getMessage()
    assert "unlike those that were tried" in message and "LlamaForCausalLM" in message
    assert "\n" not in message


@pytest.mark.parametrize("registry", [SimpleNamespace(), None])
def test_a_vllm_with_another_registry_is_left_alone(install, registry, caplog):
    install(registry)
    with caplog.at_level(logging.WARNING, "vllm.liar_ext"):
        plugin.register()
    assert plugin._before == {} and len(caplog.records) == 1


def test_other_names_are_no_classes():
    for name in ("LlamaForCausalLM", "OPTForCausalLM@1.2.3", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(plugin, name)


def test_rows_of_tiny_families_are_one_row_of_the_page():
    rows = [
        "| SmolLM2-135M: equal | plug-in | 128 of 128 | 4e-05 |",
        "| tiny llama: dense | vLLM | 128 of 128 | 9e-05 |",
        "| tiny llama: equal | plug-in | 128 of 128 | 7e-05 |",
        "| tiny qwen3: dense | vLLM | 128 of 128 | 1e-04 |",
        "| tiny qwen3: equal | plug-in | 127 of 128 | 6e-06 |",
        "| refused: two ranks: tiny llama: unequal | | vllm: no | |",
    ]
    assert grouped(rows) == [
        "| SmolLM2-135M: equal | plug-in | 128 of 128 | 4e-05 |",
        "| tiny llama, qwen3: dense | vLLM | 128 of 128 | 1e-04 |",
        "| tiny llama: equal | plug-in | 128 of 128 | 7e-05 |",
        "| tiny qwen3: equal | plug-in | 127 of 128 | 6e-06 |",
        "| refused: two ranks: tiny llama: unequal |  | vllm: no |  |",
    ]
