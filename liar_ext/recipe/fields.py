"""The fields of a recipe: defaults, checks, and what the command's options say of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from liar_ext.errors import InputError
from liar_ext.plan import ATTN_UNITS, BUDGET_UNITS, KINDS, PHASES, Budget
from liar_ext.recipe import checks as check
from liar_ext.recipe.choices import ALLOCATIONS, DTYPES, SCHEDULES, SELF_TEXT, choice
from liar_ext.reconstruction.settings import MODES


@dataclass(frozen=True)
class Fields:
    """What :class:`liar_ext.Recipe` holds, checked one by one and then together."""

    model: str | None = choice(
        None, "model", check.text(optional=True), "model folder, hub id, or GGUF file"
    )
    dtype: str = choice("float32", "model", check.one_of(DTYPES), "data type of the weights")
    device: str = choice(
        "cpu", "model", check.text(), "cpu, cuda, cuda:1, ...; auto: spread over all GPUs"
    )
    calibration: tuple[str, ...] = choice(
        (),
        "calibration",
        check.texts,
        "text or .jsonl files, folders, names of datasets, or self: text that the model generates",
        metavar="TEXT",
    )
    samples: int = choice(
        128,
        "calibration",
        check.whole(2),
        "number of calibration sequences; encoders read that many times --seq-len tokens",
    )
    self_text: float = choice(
        SELF_TEXT,
        "calibration",
        check.number,
        "fraction of calibration text that a causal language model generates itself",
        metavar="F",
    )
    random_tokens: float | str = choice(
        "auto",
        "calibration",
        check.number_or_auto,
        "fraction of random tokens; auto: 0.25 for language models that generate no text, else 0",
        metavar="F",
    )
    seq_len: int = choice(512, "calibration", check.whole(1), "tokens per sequence")
    batch_size: int = choice(4, "calibration", check.whole(1), "sequences per forward pass")
    seed: int = choice(
        0, "calibration", check.whole(0), "random seed for sampling and the train/validation split"
    )
    memory: int | None = choice(
        None,
        "calibration",
        check.whole(1, optional=True),
        "memory for activation statistics; less takes more passes (default: 32, or half of the "
        "free memory)",
        metavar="GIB",
    )
    keep: float = choice(0.8, "budget", check.number, "fraction to keep, in (0, 1]")
    of: str = choice("prunable", "budget", check.one_of(BUDGET_UNITS), "unit of --keep")
    latency_phase: str = choice(
        "both",
        "budget",
        check.one_of(PHASES),
        "latency: time the prompt, the generated tokens, or both",
    )
    latency_batch: int = choice(1, "budget", check.whole(1), "latency: sequences at a time")
    latency_prompt: int = choice(128, "budget", check.whole(1), "latency: tokens of a prompt")
    latency_new_tokens: int = choice(32, "budget", check.whole(1), "latency: generated tokens")
    latency_table: str | None = choice(
        None,
        "budget",
        check.text(optional=True),
        "latency: table, folder or report with measured times (default: measure this device)",
        metavar="FILE",
    )
    tile: int | str = choice(
        "auto",
        "budget",
        check.tile,
        "keep a multiple of N MLP channels per layer; auto: 32, less for narrow layers",
    )
    uniform_layers: bool = choice(
        False,
        "budget",
        check.flag,
        "keep the same number of units in all layers, for standard loaders",
    )
    keep_hidden: float = choice(
        1.0,
        "budget",
        check.number,
        "fraction of the hidden size to keep; --keep counts the remaining heads and channels",
    )
    keep_experts: float = choice(
        1.0,
        "budget",
        check.number,
        "fraction of the experts per layer to keep; --keep counts the rest",
    )
    kinds: tuple[str, ...] = choice(
        KINDS,
        "budget",
        check.some_of(KINDS),
        "layers that may be pruned",
        option="--sites",
    )
    attn_unit: str = choice(
        "auto",
        "budget",
        check.one_of(ATTN_UNITS),
        "attention unit; auto: KV groups if query heads share keys",
    )
    criterion: str = choice("wifv", "selection", check.text(), "importance score")
    allocation: str = choice(
        "curve",
        "selection",
        check.one_of(ALLOCATIONS),
        "pruning ratio per layer: equal, by standardised scores, or by measured sensitivity",
    )
    reconstruct: str = choice(
        "auto",
        "reconstruction",
        check.one_of(MODES),
        "error compensation in the weights; auto: affine for layers with a bias, else linear",
    )
    damp: float | str = choice(
        "auto",
        "reconstruction",
        check.number_or_auto,
        "strength of the ridge regularisation; auto: by cross-validation",
        metavar="LAMBDA",
    )
    schedule: str = choice(
        "auto",
        "reconstruction",
        check.one_of(SCHEDULES),
        "solve on activations of the dense or of the pruned model; auto: the better one",
    )
    rescale: bool = choice(
        False,
        "reconstruction",
        check.flag,
        "after solving, fit one scale per layer output to the output of the whole model",
    )
    eval: str | None = choice(
        None,
        "evaluation",
        check.text(optional=True),
        "measure perplexity before and after on this held-out text",
        metavar="TEXT",
    )
    eval_samples: int | None = choice(
        None,
        "evaluation",
        check.whole(1, optional=True),
        "evaluate on N evenly spread windows (default: all)",
    )
    certify: int = choice(
        0,
        "evaluation",
        check.whole(0),
        "report errors on N more sequences, from unused documents; 16 is a good number",
    )

    def __post_init__(self) -> None:
        # They import torch, which the command needs no sooner than a job.
        from liar_ext.data.sequences import check_fraction
        from liar_ext.reconstruction.layerwise import check_mode
        from liar_ext.selection.criteria import get_criterion

        for each in fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)
        _ = self.budget
        for name in ("self_text", "random_tokens"):
            if getattr(self, name) != "auto":
                check_fraction("recipe", name, getattr(self, name))
        if not 0.0 < self.keep_hidden <= 1.0:
            raise InputError(
                f"recipe: keep_hidden must be in (0, 1], got {self.keep_hidden}; 0.9 keeps 90 %"
            )
        if not 0.0 < self.keep_experts <= 1.0:
            raise InputError(
                f"recipe: keep_experts must be in (0, 1], got {self.keep_experts}; 0.75 keeps 75 %"
            )
        if self.of == "kv_cache" and "attn" not in self.kinds:
            raise InputError(
                "recipe: a budget of kv_cache is spent on attention, got kinds="
                f"{list(self.kinds)}; add attn, or count another cost"
            )
        self._check_latency()
        if self.calibration and self.seq_len < 2:
            raise InputError(f"recipe: seq_len must be at least 2 for text, got {self.seq_len}")
        if self.certify == 1:
            raise InputError("recipe: certify must be 0, or at least 2 sequences, got 1")
        get_criterion(self.criterion)
        if self.schedule == "layerwise":
            check_mode(self.reconstruct)

    def _check_latency(self) -> None:
        if self.latency_table is None:
            return
        if self.of != "latency":
            raise InputError(
                f"recipe: latency_table is for of='latency', got of={self.of!r}; leave one out"
            )
        if self.keep_hidden != 1.0:
            raise InputError(
                "recipe: latency_table can't be of a model whose hidden size is yet to be pruned; "
                "leave it out, and the narrowed model is measured"
            )

    @property
    def prunable_kinds(self) -> tuple[str, ...]:
        """Those of ``kinds`` that the budget counts: MLPs cache nothing, and stay whole."""
        return ("attn",) if self.of == "kv_cache" else self.kinds

    @property
    def budget(self) -> Budget:
        """The fields that a budget has."""
        return Budget(**{each.name: getattr(self, each.name) for each in fields(Budget)})
