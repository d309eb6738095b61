"""The fields of a recipe: defaults, checks, and what the command's options say of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from liar_ext.calibration.self_calibration import SELF_TEXT
from liar_ext.data.sequences import check_fraction
from liar_ext.errors import InputError
from liar_ext.models.sites import ATTN_UNITS, KINDS
from liar_ext.plan import BUDGET_UNITS, PHASES, Budget
from liar_ext.recipe import checks as check
from liar_ext.recipe.choices import ALLOCATIONS, DTYPES, SCHEDULES, choice
from liar_ext.reconstruction.layerwise import check_mode
from liar_ext.reconstruction.settings import MODES
from liar_ext.selection.criteria import get_criterion


@dataclass(frozen=True)
class Fields:
    """What :class:`liar_ext.Recipe` holds, checked one by one and then together."""

    model: str | None = choice(
        None, "model", check.text(optional=True), "model folder, hub id, or GGUF file"
    )
    dtype: str = choice("float32", "model", check.one_of(DTYPES), "of the weights")
    device: str = choice(
        "cpu", "model", check.text(), "cpu, cuda, cuda:1, ...; auto: spread over all"
    )
    calibration: tuple[str, ...] = choice(
        (),
        "calibration",
        check.texts,
        "text files, .jsonl files with a field text, folders of text files, or names of the "
        "datasets library (NAME[:CONFIG[:SPLIT]]), or self: text that the model writes itself; "
        "sequences are drawn evenly from all",
        metavar="TEXT",
    )
    samples: int = choice(
        128,
        "calibration",
        check.whole(2),
        "calibration sequences; encoders read document by document, as many as make so many times "
        "--seq-len tokens",
    )
    self_text: float = choice(
        SELF_TEXT,
        "calibration",
        check.number,
        "fraction of the calibration text that a causal language model writes itself, beside the "
        "texts that are named, unless self is one of them or --max-memory is given: then none",
        metavar="F",
    )
    random_tokens: float | str = choice(
        "auto",
        "calibration",
        check.number_or_auto,
        "fraction of all calibration sequences with tokens drawn from the vocabulary, beside those "
        "of text; auto is 0.25 for language models that write no text of their own, and else 0",
        metavar="F",
    )
    seq_len: int = choice(512, "calibration", check.whole(1), "tokens per sequence")
    batch_size: int = choice(4, "calibration", check.whole(1), "sequences per forward pass")
    seed: int = choice(0, "calibration", check.whole(0), "of the draw and the folds")
    memory: int | None = choice(
        None,
        "calibration",
        check.whole(1, optional=True),
        "for sums over the calibration text at a time, 16 d² bytes for a layer of d inputs: what "
        "needs more is summed in groups of layers, with more passes and the same result (32, or "
        "half of what is free, by default)",
        metavar="GIB",
    )
    keep: float = choice(0.8, "budget", check.number, "fraction to keep, in (0, 1]")
    of: str = choice("prunable", "budget", check.one_of(BUDGET_UNITS), "what the fraction counts")
    latency_phase: str = choice(
        "both",
        "budget",
        check.one_of(PHASES),
        "latency: time of a prompt, of the tokens generated after it, or of both",
    )
    latency_batch: int = choice(1, "budget", check.whole(1), "latency: sequences at a time")
    latency_prompt: int = choice(128, "budget", check.whole(1), "latency: tokens of a prompt")
    latency_new_tokens: int = choice(
        32, "budget", check.whole(1), "latency: tokens generated after it"
    )
    latency_table: str | None = choice(
        None,
        "budget",
        check.text(optional=True),
        "latency: a table measured before, or a folder or report that has one; measured on this "
        "device by default",
        metavar="FILE",
    )
    tile: int | str = choice(
        "auto",
        "budget",
        check.tile,
        "MLP channels that a layer keeps are a multiple of this; auto is 32, halved for layers "
        "that have fewer than eight of them. Heads stay whole",
    )
    uniform_layers: bool = choice(
        False,
        "budget",
        check.flag,
        "all layers keep equally many units, so that stock loaders take the result",
    )
    keep_hidden: float = choice(
        1.0,
        "budget",
        check.number,
        "fraction of the hidden size to keep; narrowed first, and --keep counts the rest. Use "
        "--keep 1 to narrow only. Takes two passes over the calibration text, more where the sums "
        "of all norms are over 8 GiB, or --memory",
    )
    keep_experts: float = choice(
        1.0,
        "budget",
        check.number,
        "fraction of the experts of each layer to keep, in a mixture of experts; they leave first, "
        "and --keep counts the rest. Use --keep 1 to remove experts only",
    )
    kinds: tuple[str, ...] = choice(
        KINDS,
        "budget",
        check.some_of(KINDS),
        "sites that may be pruned; prunable parameters are theirs",
        option="--sites",
    )
    attn_unit: str = choice(
        "auto",
        "budget",
        check.one_of(ATTN_UNITS),
        "attention unit; auto takes KV groups where query heads share keys",
    )
    criterion: str = choice("wifv", "selection", check.text(), "importance score")
    allocation: str = choice(
        "curve",
        "selection",
        check.one_of(ALLOCATIONS),
        "how the pruning ratio is distributed over layers: the same everywhere, by standardised "
        "scores, or by error curves and the measured sensitivity of each site (a few more forward "
        "passes)",
    )
    reconstruct: str = choice(
        "auto",
        "reconstruction",
        check.one_of(MODES),
        "error compensation: none, of the means (bias), a linear map of what stays, both (affine); "
        "auto is affine where a consumer has a bias and linear elsewhere; bias and affine give "
        "consumers a bias if they lack one",
    )
    damp: float | str = choice(
        "auto",
        "reconstruction",
        check.number_or_auto,
        "ridge regularisation, or auto: by cross-validation",
        metavar="LAMBDA",
    )
    schedule: str = choice(
        "auto",
        "reconstruction",
        check.one_of(SCHEDULES),
        "solve all layers on the dense model's activations, or one after the other on the pruned "
        "model's; auto does both and keeps what is nearer to the dense model on held-out text",
    )
    rescale: bool = choice(
        False,
        "reconstruction",
        check.flag,
        "after all layers are solved, fit one scale for what each of them gives, so that the whole "
        "model's output is nearest to the dense one's",
    )
    eval: str | None = choice(
        None,
        "evaluation",
        check.text(optional=True),
        "held-out text: report perplexity before and after",
        metavar="TEXT",
    )
    eval_samples: int | None = choice(
        None, "evaluation", check.whole(1, optional=True), "evaluate on N windows, evenly spread"
    )
    certify: int = choice(
        0,
        "evaluation",
        check.whole(0),
        "draw N more calibration sequences, of documents that no decision sees, and report the "
        "errors on them; 16 are a good number",
    )

    def __post_init__(self) -> None:
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
