"""The files of a saved folder, by name."""

from __future__ import annotations

from pathlib import Path

from liar_ext.models import liar_loader

# Below a folder of its own: what globs *.safetensors at a folder's top takes all of it for weights,
# and what copies a model elsewhere leaves it behind.
OWN_FOLDER = "liar"
PLAN_FILE = f"{OWN_FOLDER}/plan.json"
FINGERPRINT_FILE = f"{OWN_FOLDER}/fingerprint.safetensors"
MANIFEST_FILE = f"{OWN_FOLDER}/manifest.json"
REPORT_JSON = f"{OWN_FOLDER}/report.json"
REPORT_MARKDOWN = f"{OWN_FOLDER}/report.md"
VOCABULARY_FILE = f"{OWN_FOLDER}/vocabulary.json"
RECIPE_YAML = f"{OWN_FOLDER}/recipe.yaml"
CARD_FILE = "README.md"
# What was exported from the folder, and where it lies.
EXPORTS_FILE = f"{OWN_FOLDER}/exports.json"
# In a folder that is being written, or removed: nobody else's folder has it.
MARKER_FILE = ".liar_saving"
MARK_VERSION = 2
# The code that from_pretrained(folder, trust_remote_code=True) runs, named by auto_map.
LOADER_MODULE = liar_loader.__name__.rpartition(".")[2]
LOADER_FILE = f"{LOADER_MODULE}.py"
LOADER_CODE = Path(liar_loader.__file__).read_text(encoding="utf-8")
# What transformers leaves on a model that it read from GGUF, and what forbids to save it.
QUANTISER_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")
# Any of these says that a folder has a tokenizer.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
# Any of these describes the processor of a model that reads pictures or recordings.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

# Of version 0.1.0, whose folders are loaded.
OLD_MARK_VERSION = 1
OLD_PLAN_FILE = "liar_plan.json"
