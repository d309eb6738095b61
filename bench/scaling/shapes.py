"""Shapes of decoders, and the choices of a job that its work depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from liar_ext.calibration.saved_sums import bytes_of_sums, split
from liar_ext.job.estimate import bytes_of_solve
from liar_ext.reconstruction.ridge import DAMP_LADDER

# Finite λ of the ladder that a walk tries at a site, see `liar_ext.reconstruction.ladder.choose`.
TRIED = 4
WIDTH = 2  # bytes of a weight and of a hidden feature, bfloat16


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind: gated MLP, no biases, an output head of its own."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    channels: int
    vocabulary: int
    head_dim: int = 128

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Return the shape that a config of transformers says."""
        return cls(
            config.model_type,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
            config.vocab_size,
            config.head_dim,
        )

    @property
    def features(self) -> dict[str, int]:
        """Inputs of the consumer, by kind of site."""
        return {"attn": self.heads * self.head_dim, "mlp": self.channels}

    @property
    def projections(self) -> int:
        """Weights of q, k and v."""
        return self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)

    @property
    def block(self) -> int:
        """Weights of a block but for its norms; all of them may be pruned."""
        attention = self.projections + self.hidden * self.features["attn"]
        return attention + 3 * self.hidden * self.channels

    @property
    def params(self) -> int:
        """Weights of the model but for its norms."""
        return self.layers * self.block + 2 * self.vocabulary * self.hidden


SHAPES = (
    Shape("Llama-2-7B", 4096, 32, 32, 32, 11008, 32_000),
    Shape("32B, vocabulary of 128,000", 5120, 64, 40, 8, 27648, 128_000),
    Shape("Llama-3-70B", 8192, 80, 64, 8, 28672, 128_256),
)


@dataclass(frozen=True)
class Settings:
    """The choices of a job: by default those of ``liar prune``, in bfloat16.

    ``kept`` and ``probed`` are the features that the plan and the probes leave, by kind of site,
    where it isn't ``keep`` of them. ``tried`` are the finite λ that a walk tries at a site, on
    average, where it isn't ``TRIED`` of them. ``room`` is of the sums that a pass collects, in
    bytes.
    """

    sequences: int = 171  # 128 of text, and a third as many of random tokens
    length: int = 512
    batch: int = 4
    keep: float = 0.8
    layerwise: bool = True
    curve: bool = True
    by_blocks: bool = False
    room: int = 1 << 62
    kept: dict[str, int] = field(default_factory=dict)
    probed: dict[str, int] = field(default_factory=dict)
    tried: dict[str, float] = field(default_factory=dict)
    ladder: int = len(DAMP_LADDER)

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.length

    @property
    def batches(self) -> int:
        """Forward passes that all sequences take."""
        return -(-self.sequences // self.batch)

    def stays(self, shape: Shape, kind: str, given: dict[str, int] | None = None) -> int:
        """Return the features that stay of a site."""
        given = self.kept if given is None else given
        return given.get(kind, round(self.keep * shape.features[kind]))


def groups_of(shape: Shape, settings: Settings) -> list[list[tuple[int, str]]]:
    """Return the sites, block and kind, that each pass of calibration sums.

    Counts :func:`liar_ext.calibration.saved_sums.group_sites`.
    """
    at = [(block, kind) for block in range(shape.layers) for kind in ("attn", "mlp")]
    sizes = [bytes_of_sums(shape.features[kind]) for _, kind in at]
    return split(at, sizes, settings.room)


def bytes_at_once(shape: Shape, settings: Settings) -> dict[str, int]:
    """Return what a job holds on a device, activations aside, by what takes it.

    Counts :func:`liar_ext.job.estimate.bytes_by_blocks`, whose factors were measured, and
    :class:`liar_ext.calibration.collect.Passes` where the model is whole.
    """
    widest = max(shape.features.values())
    steps = ["towards"] if settings.layerwise else ["linear"]
    steps += ["linear", "curve"] if settings.curve else []
    sizes = {kind: bytes_of_sums(d) for kind, d in shape.features.items()}
    cross = settings.layerwise * 16 * widest * shape.hidden
    if settings.by_blocks:
        # The block and the one that is read ahead, and the embeddings.
        weights = WIDTH * (2 * shape.block + shape.vocabulary * shape.hidden)
        sums = max(sum(sizes.values()), sizes["mlp"] + cross)
    else:
        weights = WIDTH * shape.params
        groups = groups_of(shape, settings)
        sums = max(sum(sizes[kind] for _, kind in group) for group in groups)
        sums = max(sums, sizes["mlp"] + cross)
    return {
        "weights": weights,
        "sums": sums,
        "a solve": bytes_of_solve(widest, shape.hidden, steps),
    }
