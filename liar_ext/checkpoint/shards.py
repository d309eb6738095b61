"""Write a model's weights as they come: a shard of safetensors at a time, and their index last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from liar_ext.checkpoint.inspection import INDEX, WEIGHTS

SHARD_BYTES = 2 << 30  # a shard is held in memory until it is written


class Shards:
    """The weights of a model on their way to a folder.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Whose weights they are: it knows by which names they are saved.
    folder : Path
        Where they go.
    size : int
        Bytes of a shard: it is written as soon as it has so many.
    """

    def __init__(self, model: nn.Module, folder: Path, size: int = SHARD_BYTES) -> None:
        self._model, self._folder, self._size = model, folder, size
        self._waiting: dict[str, Tensor] = {}
        self._written: list[list[str]] = []  # names by shard
        self._bytes = self._params = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors by their name in the model; those that share memory come in one call."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        left_out = self._model._keys_to_ignore_on_save or ()
        kept = {name: value for name, value in tensors.items() if name not in left_out}
        kept = remove_tied_weights_from_state_dict(kept, self._model)
        for name, value in revert_weight_conversion(self._model, kept).items():
            self._waiting[name] = value.detach().cpu().contiguous()
            self._params += value.numel()
        if sum(value.nbytes for value in self._waiting.values()) >= self._size:
            self._write()

    def close(self) -> None:
        """Write what is left, give the shards their names, and write the index, last of all."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / WEIGHTS)
            return
        where = {}
        for index, names in enumerate(self._written):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            self._part(index).rename(self._folder / file)
            where |= dict.fromkeys(names, file)
        facts = {"total_parameters": self._params, "total_size": self._bytes}
        text = json.dumps({"metadata": facts, "weight_map": where}, indent=2, sort_keys=True)
        (self._folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index + 1:05}.safetensors"

    def _write(self) -> None:
        if self._waiting:
            self._written.append(list(self._waiting))
            self._bytes += sum(value.nbytes for value in self._waiting.values())
            path = self._part(len(self._written) - 1)
            save_file(self._waiting, path, metadata={"format": "pt"})
            self._waiting = {}
