"""What removing whole experts costs, and whether merging them by least squares gains.

    make split-experts WIKITEXT=FOLDER

No weights of a real mixture of experts are at hand, so the mixture is artificial: the MLPs of
SmolLM2-135M are split into experts, eight by default, of channels that are active together, with a
router that predicts how large each expert's output is. With all of eight active its logits differ
by 0.1 %. It is not a mixture that anybody trained, and says how ways to remove experts compare, no
more.

A layer gives ``y_t = Σ_e r_te W_e x_te``. Of the experts K that stay, merging solves all consumers
at once, on the tokens as they are sent to K, towards the output of all::

    min Σ_t |y_t − Σ_{e∈K} r'_te (W_e + D_e) x_te|² + λ Σ_e |D_e|²

Gap is the mean over four texts of log(perplexity / that of the mixture).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common import write_json
from bench.quality.models import load
from bench.quality.texts import Texts, choose_texts, write_texts
from bench.quality.windows import HeldOut
from liar_ext import prune

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "split_experts"
SEED, SEQ_LEN, SAMPLES, WINDOWS = 0, 256, 24, 3
SMALL = 1e-4  # logits so small that the weights of active experts are alike
LADDER = (1e-3, 1e-2, 1e-1, math.inf)
SPLIT_TOKENS, ROUNDS = 2048, 3


class Layer:
    """One layer of experts: what it reads, and what each expert gives."""

    def __init__(self, moe: nn.Module) -> None:
        self.moe, self.up, self.down = moe, moe.experts.gate_up_proj, moe.experts.down_proj
        self.top_k, self.experts = moe.gate.top_k, len(moe.gate.weight)

    def routed(self, h: Tensor, kept: Tensor) -> Tensor:
        """Return the weights r' of all experts, (tokens, experts), of which ``kept`` are left."""
        logits = torch.full((len(h), self.experts), -math.inf)
        logits[:, kept] = h @ self.moe.gate.weight[kept].T
        chosen = logits.topk(self.top_k, -1).indices
        weight = logits.softmax(-1).gather(1, chosen)
        weight = weight / weight.sum(-1, keepdim=True)
        return torch.zeros(len(h), self.experts).scatter_(1, chosen, weight)

    def read(self, h: Tensor) -> Tensor:
        """Return what the consumers read, (experts, tokens, width)."""
        gate, up = torch.einsum("th,eih->eti", h, self.up).chunk(2, -1)
        return nn.functional.silu(gate) * up

    def output(self, h: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return y, of all experts or of some."""
        r, x = self.routed(h, torch.arange(self.experts) if kept is None else kept), self.read(h)
        return torch.einsum("te,eti,eoi->to", r, x, self.down)


def clusters(x: Tensor, size: int) -> Tensor:
    """Return channels in groups of equal size that are active on the same tokens, by k-means."""
    rows = nn.functional.normalize(x.abs().T, dim=1)
    generator = torch.Generator().manual_seed(SEED)
    centres = rows[torch.randperm(len(rows), generator=generator)[: len(rows) // size]]
    for _ in range(ROUNDS):
        places = assigned(rows @ centres.T, size)
        centres = torch.stack([rows[places == at].mean(0) for at in range(len(centres))])
        centres = nn.functional.normalize(centres, dim=1)
    return places.argsort(stable=True).view(-1, size)


def assigned(near: Tensor, size: int) -> Tensor:
    """Return the nearest centre with room of each row, the most decided rows first."""
    best = near.topk(2, 1).values
    places, room = torch.zeros(len(near), dtype=torch.long), near.new_zeros(near.shape[1])
    for row in (best[:, 1] - best[:, 0]).argsort(stable=True).tolist():
        places[row] = near[row].masked_fill(room >= size, -math.inf).argmax()
        room[places[row]] += 1
    return places


@torch.no_grad()
def with_active(whole: nn.Module, ids: Tensor, active: int) -> nn.Module:
    """Return the mixture with so many experts active for a token.

    Its consumers are solved layer by layer for that, towards the output of all experts.
    """
    model, experts = copy.deepcopy(whole), whole.config.num_local_experts
    model.config.num_experts_per_tok = active
    for layer in model.model.layers:
        layer.mlp.gate.top_k = layer.mlp.top_k = active
        layer.mlp.experts.down_proj.data.mul_(active / experts)
    every = torch.arange(experts)
    for at, moe, h in inputs_of(model, ids) if active < experts else ():
        target = Layer(whole.model.layers[at].mlp).output(h)
        moe.experts.down_proj.copy_(merged(Layer(moe), h, every, target))
    return model


@torch.no_grad()
def split(dense: nn.Module, ids: Tensor, experts: int) -> nn.Module:
    """Return the mixture, with all experts active for a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    old, skipped = dense.config, ("model_type", "architectures", "intermediate_size")
    fields = {name: value for name, value in old.to_dict().items() if name not in skipped}
    width = old.intermediate_size // experts
    more = {"num_local_experts": experts, "num_experts_per_tok": experts, "sliding_window": None}
    config = MixtralConfig(**fields, intermediate_size=width, **more)
    model = MixtralForCausalLM(config).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    model.tie_weights()
    for layer, mlp, h in inputs_of(dense, ids):
        x = mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h)
        groups = clusters(x[:: max(1, len(h) // SPLIT_TOKENS)], width)
        moe = model.model.layers[layer].mlp
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        sizes = torch.stack([(x[:, g] @ down[:, g].T).norm(dim=1) for g in groups], 1)
        share = sizes / sizes.mean(1, keepdim=True)
        gram = h.T @ h + 1e-3 * (h.square().sum() / h.shape[1]) * torch.eye(h.shape[1])
        moe.gate.weight.copy_(SMALL * torch.linalg.solve(gram, h.T @ (share - 1)).T)
        moe.experts.gate_up_proj.copy_(torch.stack([torch.cat([gate[g], up[g]]) for g in groups]))
        moe.experts.down_proj.copy_(experts * torch.stack([down[:, g] for g in groups]))
    return model


@torch.no_grad()
def inputs_of(model: nn.Module, ids: Tensor) -> Iterator[tuple[int, nn.Module, Tensor]]:
    """Yield number and MLP of each layer, and what it reads, (tokens, hidden), layer by layer.

    The MLP may be changed meanwhile: its layer is run anew then.
    """
    body = model.model
    hidden = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    how = {"position_embeddings": body.rotary_emb(hidden, positions), "attention_mask": None}
    for number, layer in enumerate(body.layers):
        attended = hidden + torch.cat(
            [
                layer.self_attn(layer.input_layernorm(part), position_ids=positions, **how)[0]
                for part in hidden.split(8)
            ]
        )
        read = layer.post_attention_layernorm(attended)
        yield number, layer.mlp, read.flatten(0, 1)
        hidden = attended + layer.mlp(read)


def reap(layer: Layer, h: Tensor, count: int) -> Tensor:
    """Return the experts of the largest mean of r |f(h)| over the tokens sent to each (REAP)."""
    every = torch.arange(layer.experts)
    r, x = layer.routed(h, every), layer.read(h)
    size = torch.stack([(x[e] @ layer.down[e].T).norm(dim=1) for e in every], 1)
    score = (r * size).sum(0) / (r > 0).sum(0).clamp(min=1)
    return score.topk(count).indices.sort().values


def frequency(layer: Layer, h: Tensor, count: int) -> Tensor:
    """Return the experts that most tokens are sent to."""
    used = (layer.routed(h, torch.arange(layer.experts)) > 0).sum(0)
    return used.topk(count).indices.sort().values


def greedy(layer: Layer, h: Tensor, count: int) -> Tensor:
    """Return the experts that are left when they go one by one, by the error of the output."""
    some = h[:: max(1, len(h) // SPLIT_TOKENS)]
    kept, y, x = torch.arange(layer.experts), layer.output(some), layer.read(some)
    given = torch.einsum("eti,eoi->teo", x, layer.down)
    while len(kept) > count:
        left = [torch.cat([kept[:at], kept[at + 1 :]]) for at in range(len(kept))]
        errors = [
            (y - torch.einsum("te,teo->to", layer.routed(some, k), given)).norm() for k in left
        ]
        kept = left[int(torch.stack(errors).argmin())]
    return kept


def merged(layer: Layer, h: Tensor, kept: Tensor, target: Tensor) -> Tensor:
    """Return the consumers of ``kept`` that bring the output nearest to a target, λ by folds."""
    r, x = layer.routed(h, kept), layer.read(h)
    z = torch.cat([r[:, e, None] * x[e] for e in kept], 1)
    old = torch.cat([layer.down[e] for e in kept], 1)
    rest = target - z @ old.T
    fold = (torch.arange(len(h)) // SEQ_LEN) % 2
    sums = [(z[fold == f].T @ z[fold == f], rest[fold == f].T @ z[fold == f]) for f in range(2)]
    errors = []
    for damp in LADDER:
        error = 0.0
        for f, (gram, cross) in enumerate(sums):
            there = fold == 1 - f
            change = solved(gram, cross, damp)
            error += float((rest[there] - z[there] @ change.T).square().sum())
        errors.append(error)
    best = min(range(len(LADDER)), key=errors.__getitem__)
    gram, cross = (a + b for a, b in zip(*sums, strict=True))
    new = old + solved(gram, cross, LADDER[best])
    return torch.stack(new.split(layer.down.shape[2], 1))


def solved(gram: Tensor, cross: Tensor, damp: float) -> Tensor:
    """Return ``C (G + λ mean(diag G) I)⁻¹``."""
    if math.isinf(damp):
        return torch.zeros_like(cross)
    damped = gram.double() + damp * gram.diagonal().mean() * torch.eye(len(gram)).double()
    return torch.cholesky_solve(cross.T.double(), torch.linalg.cholesky(damped)).T.float()


def scaled(layer: Layer, h: Tensor, kept: Tensor, target: Tensor) -> Tensor:
    """Return the consumers of ``kept``, each times a number, that bring the output nearest."""
    r, x = layer.routed(h, kept), layer.read(h)
    given = torch.stack([r[:, e, None] * (x[e] @ layer.down[e].T) for e in kept], 0).flatten(1)
    scales = torch.linalg.lstsq(given.T.double(), target.flatten()[:, None].double()).solution
    return layer.down[kept] * scales[:, :, None].float()


WAYS = ("none", "scale", "merge", "merge, layer by layer")
CHOICES: dict[str, Callable[[Layer, Tensor, int], Tensor]] = {
    "frequency": frequency,
    "REAP": reap,
    "output error": greedy,
}


@torch.no_grad()
def removed(
    mixture: nn.Module, ids: Tensor, count: int, choice: str, way: str, given: dict
) -> tuple:
    """Return the mixture without some experts, and the mean error of its layers' outputs.

    ``way`` is "none", "scale", "merge" or "merge, layer by layer": the last reads what the layers
    before give once they are solved. ``given`` has what the layers of the mixture read.
    """
    model, errors = copy.deepcopy(mixture), []
    late = way.endswith("layer by layer")
    wholes = [layer.mlp for layer in mixture.model.layers]
    reads = inputs_of(model, ids) if late else given.items()
    for at, *_, h in reads:
        layer, place = Layer(wholes[at]), model.model.layers[at].mlp
        kept = CHOICES[choice](layer, given[at], count)
        target = layer.output(h)
        down = layer.down[kept]
        if way == "scale":
            down = scaled(layer, h, kept, target)
        elif way.startswith("merge"):
            down = merged(layer, h, kept, target)
        r, x = layer.routed(h, kept), layer.read(h)
        found = sum(r[:, e, None] * (x[e] @ d.T) for e, d in zip(kept, down, strict=True))
        errors.append(float((found - target).square().sum() / target.square().sum()))
        place.experts.gate_up_proj = nn.Parameter(layer.up[kept].clone(), requires_grad=False)
        place.experts.down_proj = nn.Parameter(down.clone(), requires_grad=False)
        place.gate.weight = nn.Parameter(place.gate.weight[kept].clone(), requires_grad=False)
        place.experts.num_experts = place.gate.num_experts = count
    return model, sum(errors) / len(errors)


def by_command(mixture: nn.Module, ids: Tensor, count: int) -> tuple[nn.Module, str]:
    """Return the mixture as ``liar prune --keep 1 --keep-experts`` leaves it, and its way."""
    model = copy.deepcopy(mixture)
    keep = count / mixture.config.num_local_experts
    report = prune(model, [{"input_ids": part} for part in ids.split(8)], 1.0, keep_experts=keep)
    return model, report.sites[0].path


def main() -> None:
    """Split, remove, measure; print and keep a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of WikiText-2")
    parser.add_argument("--experts", type=int, default=8, help="experts of a layer")
    parser.add_argument("--active", type=int, default=4, help="experts of each token")
    parser.add_argument("--keep", type=int, default=6, help="experts that stay")
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES))
    options = parser.parse_args()
    write_texts(OUT / "texts")
    texts = Texts(*choose_texts(OUT / "texts", ["encyclopaedia", "news"], [], options.wikitext))
    dense, tokenizer, _ = load("SmolLM2-135M-Instruct")
    how = {"samples": SAMPLES, "seq_len": SEQ_LEN, "seed": SEED, "lone": "blocks"}
    ids = texts.draw(dense, tokenizer, **how, self_text=0.0, random_tokens=0.0).input_ids
    windows = texts.windows(tokenizer, seq_len=SEQ_LEN, samples=WINDOWS)
    whole = split(dense, ids, options.experts)
    off = largest_difference(whole, dense, ids[:1])
    print(f"with all experts active logits are off by {off:.1e} of their largest", flush=True)
    first = judged(dense, windows)
    mixture = with_active(whole, ids, options.active)
    given = {at: h for at, _, h in inputs_of(mixture, ids)}
    base = judged(mixture, windows)
    rows = [row_of("dense", first, {}), row_of("mixture", base, first)]
    start = time.process_time()
    model, way = by_command(mixture, ids, options.keep)
    row = row_of(f"--keep-experts, {way}", judged(model, windows), base)
    rows.append(row | {"seconds": round(time.process_time() - start)})
    print(json.dumps(rows), flush=True)
    for choice in options.choices:
        for way in options.ways:
            start = time.process_time()
            model, error = removed(mixture, ids, options.keep, choice, way, given)
            row = row_of(f"{choice}, {way}", judged(model, windows), base)
            row |= {"error": round(error, 4), "seconds": round(time.process_time() - start)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            name = f"{options.keep} of {options.experts}, {options.active} active.json"
            write_json(OUT / name, rows)


@torch.no_grad()
def largest_difference(model: nn.Module, dense: nn.Module, ids: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest of the dense model's."""
    expected = dense(ids).logits
    return float((model(ids).logits - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def judged(model: nn.Module, windows: dict[str, HeldOut]) -> dict[str, float]:
    """Return the perplexity by text."""
    return {name: text.judge(model)["perplexity"] for name, text in windows.items()}


def row_of(name: str, texts: dict[str, float], base: dict[str, float]) -> dict:
    """Return a row: perplexities, and the gap to a base."""
    ratios = [math.log(texts[each] / base[each]) for each in base]
    gap = sum(ratios) / len(ratios) if ratios else 0.0
    return {"name": name, "gap": round(gap, 4), "texts": {n: round(p, 2) for n, p in texts.items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
