"""Modules under the names that version 0.1.0 gave them, for code that imports them so."""

import importlib
import sys

MOVED = {
    "arch": "models.sites",
    "criteria": "selection.criteria",
    "curves": "selection.error_curves",
    "gradients": "calibration.gradients",
    "layerwise": "reconstruction.layerwise",
    "texts": "data.texts",
}

for _old, _new in MOVED.items():
    _module = sys.modules[f"liar_ext.{_old}"] = importlib.import_module(f"liar_ext.{_new}")
    setattr(sys.modules["liar_ext"], _old, _module)  # for import liar_ext.old; liar_ext.old.name
