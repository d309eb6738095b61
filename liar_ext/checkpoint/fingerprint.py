"""A fixed input with the output that a model had for it, kept beside its weights.

Whoever loads the weights later can tell, without any other data, that they still compute the
same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from liar_ext.errors import InputError

PROBE_FILE = "liar_probe.safetensors"
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """What a model computed when it was saved.

    Parameters
    ----------
    name : str
        Argument of ``forward`` that takes the input: ``input_ids`` or ``pixel_values``.
    input, output : Tensor
        One sequence or image; its logits, or last hidden state where there is no head.
    dtype : torch.dtype
        Of the model.
    attention : str
        Attention implementation.
    params : int
        Parameters of the model, shared ones counted once.
    """

    name: str
    input: Tensor
    output: Tensor
    dtype: torch.dtype
    attention: str
    params: int

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding explains: ``√ε · max |y|``."""
        return math.sqrt(torch.finfo(self.dtype).eps) * float(self.output.abs().max())


def write_probe(model: nn.Module, folder: Path) -> None:
    """Run a model on a fixed random input, and write both to ``liar_probe.safetensors``."""
    name, value = _draw_input(model)
    tensors = {"input": value, "output": _run(model, name, value)}
    facts = {
        "name": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "params": str(count_params(model)),
    }
    save_file(tensors, folder / PROBE_FILE, metadata=facts)


def read_probe(folder: Path) -> Probe:
    """Read what :func:`write_probe` wrote.

    Raises
    ------
    InputError
        If the folder has no probe.
    """
    path = folder / PROBE_FILE
    if not path.exists():
        raise InputError(f"verify: {folder} has no {PROBE_FILE}; save the model with save_pruned")
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        return Probe(
            name=facts["name"],
            input=file.get_tensor("input"),
            output=file.get_tensor("output"),
            dtype=getattr(torch, facts["dtype"]),
            attention=facts["attention"],
            params=int(facts["params"]),
        )


def compare_probe(model: nn.Module, probe: Probe) -> dict[str, Any]:
    """Return how far a loaded model is from the one that was saved.

    Returns
    -------
    dict
        ``max_abs_difference`` of the outputs, ``params``, and ``agrees``: within the tolerance,
        with as many parameters.
    """
    output = _run(model, probe.name, probe.input)
    same_shape = output.shape == probe.output.shape
    difference = float((output - probe.output).abs().max()) if same_shape else math.inf
    params = count_params(model)
    return {
        "max_abs_difference": difference,
        "params": params,
        "agrees": difference <= probe.tolerance and params == probe.params,
    }


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _draw_input(model: nn.Module) -> tuple[str, Tensor]:
    """Return one random sequence of tokens, or one random image."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, model.config.num_channels, height, width)
        return "pixel_values", torch.randn(shape, generator=generator)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", PROBE_TOKENS))
    return "input_ids", torch.randint(vocabulary, (1, tokens), generator=generator)


@torch.no_grad()
def _run(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return logits, or the last hidden state, in float32 on the CPU."""
    value = value.to(model.device)
    if value.is_floating_point():
        value = value.to(model.dtype)
    training = model.training
    model.eval()
    try:
        result = model(**{name: value})
    finally:
        model.train(training)
    output = result["logits"] if "logits" in result else result["last_hidden_state"]
    return output.cpu() if output.dtype == torch.float64 else output.float().cpu()
