"""The files of a saved folder, by name."""

from __future__ import annotations

PLAN_FILE = "liar_plan.json"
# Below a folder of its own: what globs *.safetensors at a folder's top takes all of it for weights.
FINGERPRINT_FILE = "liar/fingerprint.safetensors"
OLD_FINGERPRINT_FILE = "liar_probe.safetensors"  # of version 0.1.0
MANIFEST_FILE = "liar_manifest.json"
# In a folder that is being written, or removed: nobody else's folder has it.
MARKER_FILE = ".liar_saving"
MARK_VERSION = 1
# The code that from_pretrained(folder, trust_remote_code=True) runs, named by auto_map.
LOADER_FILE = "liar_loader.py"
LOADER_CLASS = "liar_loader.PrunedModel"
LOADER_CODE = '''"""Builds the layers that liar_plan.json says; config.json names it."""

from liar_ext.checkpoint import PrunedModel

__all__ = ["PrunedModel"]
'''
# What transformers leaves on a model that it read from GGUF, and what forbids to save it.
QUANTISER_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")
