"""The fields of a recipe. A new option is one field here, and the code that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any

from liar_ext.models import plan
from liar_ext.models import recipe_checks as check
from liar_ext.system.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64")
SCHEDULES = ("auto", "one-pass", "layerwise")
ALLOCATIONS = ("uniform", "global", "curve")
SELF_TEXT = 0.25  # of all sequences; docs/quality.md shows its effect
_WANDA = {"criterion": "wanda", "allocation": "uniform", "reconstruct": "none"}
_TEXT_ALONE = {"self_text": 0.0, "random_tokens": 0.0, "tile": 1}
# docs/quality.md measures them: the cheapest job that reconstructs, the default, the best; then
# methods of papers, Wanda-sp's on the dense model's activations.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"allocation": "uniform", "schedule": "one-pass", "self_text": 0.0},
    "balanced": {},
    "best": {"rescale": True},
    "flap": {"allocation": "global", "reconstruct": "bias", **_TEXT_ALONE},
    "wanda-sp": {**_WANDA, **_TEXT_ALONE},
}
# The stages that fields belong to, in order: headings of the YAML and groups of the command's help.
GROUPS = {
    "model": "Model",
    "calibration": "Calibration",
    "budget": "Budget: how much stays",
    "selection": "Selection: which units stay",
    "reconstruction": "Reconstruction: error compensation in the weights that stay",
    "evaluation": "Evaluation",
}
# Whether a job works: with any value, with the default alone, or as a function of the value.
Works = bool | Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """What a field of a recipe says of itself; every list of fields elsewhere is made from it."""

    default: Any
    check: check.Check  # takes name and value; returns the value in its type, or raises InputError
    help: str  # of the command's option
    group: str  # stage, one of GROUPS
    # First result that depends on it: inputs, scores, plan, weights or report. Jobs on the same
    # inputs share their scores, unless a field of "scores" differs.
    affects: str
    common: bool = False  # whether --help shows the option; --help-all shows all
    option: str = ""  # name on the command line, if not that of the field
    metavar: str = ""  # placeholder of its value, if not that of its type
    # Reads the text of the option, if the type is not enough; what it can't read is returned, and
    # refused by the check.
    read: Callable[[str], Any] | None = None
    in_bank: str = ""  # part of a bank that depends on it: text, which a bank says, sensitivities
    with_bank: Works = True  # whether a job works with a bank
    streamed: Works = True  # block by block (--max-memory)
    from_sums: Works = True  # from the statistics alone, without running the model over the text
    needs: str = ""  # option and value without which it says nothing
    in_python: bool = True  # whether liar_ext.prune has such a keyword


def _field(*given: Any, **facts: Any) -> Any:
    """Return a field of a dataclass, with an option as its metadata."""
    option = Option(*given, **facts)
    return field(default=option.default, metadata=vars(option))


def option_of(each: Field) -> str:
    """Return the option of ``liar prune`` that sets a field."""
    return each.metadata["option"] or "--" + each.name.replace("_", "-")


# What fields of a stage have in common.
_model = partial(_field, group="model", affects="inputs", in_python=False)
_text = partial(_field, group="calibration", affects="inputs", in_bank="text", in_python=False)
_budget = partial(_field, group="budget", affects="plan")
_latency = partial(_budget, needs="of latency")
_whole = partial(  # leaves a smaller model, which is then pruned
    _field, group="budget", affects="scores", with_bank=False, streamed=False, from_sums=False
)
_words = partial(
    _field, group="budget", affects="inputs", with_bank=False, streamed=False, in_python=False
)
_solve = partial(_field, group="reconstruction", affects="weights")
_report = partial(_field, group="evaluation", affects="report", in_python=False)


def _without_gradients(criterion: str) -> bool:
    return check.CRITERIA[criterion] != "gradient"


@dataclass(frozen=True)
class Fields:
    """What :class:`liar_ext.Recipe` holds, checked one by one and then together."""

    model: str | None = _model(
        None,
        check.optional(check.text),
        "model folder, hub id, or GGUF file",
        common=True,
        option="MODEL",
    )
    dtype: str = _model("float32", check.one_of(DTYPES), "data type of the weights")
    device: str = _model(
        "cpu", check.text, "cpu, cuda, cuda:1, ...; auto: spread over all GPUs", common=True
    )
    calibration: tuple[str, ...] = _text(
        (),
        check.texts,
        "text or .jsonl files, folders, names of datasets, or self: text that the model generates; "
        "recordings, pictures, or pictures with text, if the model reads them",
        common=True,
        metavar="TEXT",
    )
    samples: int = _text(
        128,
        check.whole(2),
        "number of calibration sequences, or of recordings or pictures; encoders read that many "
        "times --seq-len tokens",
    )
    self_text: float = _text(
        SELF_TEXT,
        check.number,
        "fraction of calibration text that a causal language model generates itself",
    )
    random_tokens: float | str = _text(
        "auto",
        check.number_or_auto,
        "fraction of random tokens; auto: 0.25 for language models that generate no text, else 0",
    )
    seq_len: int = _text(512, check.whole(1), "tokens per sequence")
    batch_size: int = _text(4, check.whole(1), "sequences per forward pass")
    seed: int = _text(
        0,
        check.whole(0),
        "random seed for sampling and the train/validation split",
        affects="scores",
        in_python=True,
    )
    memory: int | str | None = _field(
        None,
        check.optional(check.size),
        "memory for activation statistics, as 12GiB; less takes more passes "
        "(default: 32 GiB, or half of the free memory)",
        group="calibration",
        affects="report",
        metavar="SIZE",
        read=str,
        streamed=False,
    )
    keep: float = _budget(0.8, check.number, "fraction to keep, in (0, 1]", common=True)
    of: str = _budget(
        "prunable",
        check.one_of(plan.BUDGET_UNITS),
        "unit of --keep",
        streamed=lambda unit: unit != "latency",
    )
    latency_phase: str = _latency(
        "both", check.one_of(plan.PHASES), "latency: time the prompt, the generated tokens, or both"
    )
    latency_batch: int = _latency(1, check.whole(1), "latency: sequences at a time")
    latency_prompt: int = _latency(128, check.whole(1), "latency: tokens of a prompt")
    latency_new_tokens: int = _latency(32, check.whole(1), "latency: generated tokens")
    latency_table: str | None = _budget(
        None,
        check.optional(check.text),
        "latency: table, folder or report with measured times (default: measure this device)",
        metavar="FILE",
    )
    tile: int | str = _budget(
        "auto",
        lambda _, value: plan.check_tile("recipe", value),
        "keep a multiple of N MLP channels per layer; auto: 32, less for narrow layers",
    )
    uniform_layers: bool = _budget(
        False, check.flag, "keep the same number of units in all layers, for standard loaders"
    )
    keep_hidden: float = _whole(
        1.0,
        check.share,
        "fraction of the hidden size to keep; --keep counts the remaining heads and channels",
    )
    keep_blocks: float = _whole(
        1.0, check.share, "fraction of the blocks to keep; --keep counts the rest"
    )
    keep_experts: float | int = _whole(
        1.0,
        check.experts,
        "fraction of the experts per layer to keep, or a number such as 48; --keep counts the rest",
        read=check.read_number,
        streamed=True,
    )
    keep_vocab: float | str = _words(
        1.0,
        check.vocabulary,
        "fraction of the tokens to keep, a number such as 32k, or auto; --of params counts them",
        read=check.read_tokens,
    )
    vocab_text: tuple[str, ...] = _words(
        (),
        check.texts,
        "text that decides which tokens stay (default: the calibration text)",
        metavar="TEXT",
    )
    vocab_scripts: tuple[str, ...] = _words(
        (),
        check.scripts,
        "Unicode scripts all of whose tokens stay, such as latin,greek",
        metavar="SCRIPTS",
        read=lambda text: text.split(",") if isinstance(text, str) else text,
    )
    kinds: tuple[str, ...] = _budget(
        plan.KINDS,
        check.some_of((*plan.KINDS, *plan.PARTS)),
        "layers that may be pruned; encoder, decoder: those of one part of a model that has both",
        option="--sites",
        metavar="{all,attn,mlp,encoder,decoder}",
        read=check.read_sites,
    )
    attn_unit: str = _budget(
        "auto",
        check.one_of(plan.ATTN_UNITS),
        "attention unit; auto: KV groups if query heads share keys",
        in_bank="sensitivities",
    )
    criterion: str = _field(
        "wifv",
        check.criterion,
        "importance score",
        group="selection",
        affects="scores",
        in_bank="sensitivities",
        streamed=_without_gradients,
        from_sums=_without_gradients,
    )
    allocation: str = _field(
        "curve",
        check.one_of(ALLOCATIONS),
        "pruning ratio per layer: equal, by standardised scores, or by measured sensitivity",
        group="selection",
        affects="plan",
        from_sums=lambda name: name != "curve",
    )
    reconstruct: str = _solve(
        "auto",
        check.one_of(plan.MODES),
        "error compensation in the weights; auto: affine for layers with a bias, else linear",
        in_bank="sensitivities",
    )
    damp: float | str = _solve(
        "auto",
        check.number_or_auto,
        "strength of the ridge regularisation; auto: by cross-validation",
        metavar="LAMBDA",
    )
    schedule: str = _solve(
        "auto",
        check.one_of(SCHEDULES),
        "solve on activations of the dense or of the pruned model; auto: the better one",
        from_sums=lambda name: name == "one-pass",
    )
    rescale: bool = _solve(
        False,
        check.flag,
        "after solving, fit one scale per layer output to the output of the whole model",
        streamed=False,
        from_sums=False,
    )
    eval: str | None = _report(
        None,
        check.optional(check.text),
        "measure quality before and after on this held-out text",
        common=True,
        metavar="TEXT",
    )
    eval_samples: int | None = _report(
        None,
        check.optional(check.whole(1)),
        "evaluate on N evenly spread windows, or texts of an encoder (default: all)",
        needs="eval TEXT",
    )
    certify: int = _report(
        0,
        check.whole(0),
        "report errors on N more sequences, from unused documents; 16 is a good number",
        with_bank=False,
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)
        _ = self.budget
        for name in ("self_text", "random_tokens"):
            if getattr(self, name) != "auto":
                plan.check_fraction("recipe", name, getattr(self, name))
        chosen, table = self.vocab_text or self.vocab_scripts, self.latency_table is not None
        whole = self.keep_hidden == self.keep_blocks == 1.0
        rules = {
            "vocab_text and vocab_scripts decide which tokens go, and keep_vocab keeps all; give "
            "keep_vocab, too": chosen and self.keep_vocab == 1.0,
            f"a budget of kv_cache is spent on attention, got kinds={list(self.kinds)}; add attn, "
            "or count another cost": self.of == "kv_cache" and "attn" not in self.kinds,
            f"latency_table is for of='latency', got of={self.of!r}; leave one out": (
                table and self.of != "latency"
            ),
            "latency_table can't be of a model that is yet to lose hidden features or blocks; "
            "leave it out, and the smaller model is measured": table and not whole,
            f"seq_len must be at least 2 for text, got {self.seq_len}": (
                self.calibration and self.seq_len < 2
            ),
            "certify must be 0, or at least 2 sequences, got 1": self.certify == 1,
        }
        for rule, broken in rules.items():
            if broken:
                raise InputError(f"recipe: {rule}")
        if self.schedule == "layerwise":
            plan.check_mode(self.reconstruct)

    @property
    def prunable_kinds(self) -> tuple[str, ...]:
        """Those of ``kinds`` that the budget counts: MLPs cache nothing, and stay whole."""
        return tuple(each for each in self.kinds if each != "mlp" or self.of != "kv_cache")

    @property
    def prunes_sites(self) -> bool:
        """Whether heads and channels go, and not only blocks, experts, features or tokens."""
        before = (self.keep_hidden, self.keep_experts, self.keep_blocks, self.keep_vocab)
        return self.keep < 1.0 or before == (1.0, 1.0, 1.0, 1.0)

    @property
    def budget(self) -> plan.Budget:
        """The fields that a budget has."""
        return plan.Budget(**{each.name: getattr(self, each.name) for each in fields(plan.Budget)})

    def without(self, way: str) -> list[Field]:
        """Return the fields whose values do not work in a way; see :class:`Option`."""
        found = []
        for each in recipe_fields():
            value, works = getattr(self, each.name), each.metadata[way]
            if not (works(value) if callable(works) else works or value == each.default):
                found.append(each)
        return found

    def spelled(self, each: Field) -> str:
        """Return a field and its value as the command takes them."""
        value = getattr(self, each.name)
        return option_of(each) if isinstance(value, bool) else f"{option_of(each)} {value}"


def recipe_fields(**facts: Any) -> tuple[Field, ...]:
    """Return the fields of a recipe, or only those with the given metadata."""
    return tuple(
        each for each in fields(Fields) if all(each.metadata[n] == v for n, v in facts.items())
    )
