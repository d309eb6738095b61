"""Model classes that nobody has: names that say nothing, and things that no row can describe."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class OddConfig(PreTrainedConfig):
    """No field has a name that other configs have."""

    model_type = "odd"

    def __init__(
        self, words=53, breadth=30, strata=3, lenses=4, shades=2, lens_width=6, swell=22, **fields
    ):
        self.words, self.breadth, self.strata = words, breadth, strata
        self.lenses, self.shades, self.lens_width = lenses, shades, lens_width
        self.swell = swell
        super().__init__(**fields)


class Gaze(nn.Module):
    """Grouped-query attention; keys and values are stacked in one weight."""

    def __init__(self, config):
        super().__init__()
        self.lenses, self.shades, self.lens_width = config.lenses, config.shades, config.lens_width
        self.ask = nn.Linear(config.breadth, config.lenses * config.lens_width)
        self.seen = nn.Linear(config.breadth, 2 * config.shades * config.lens_width, bias=False)
        self.tell = nn.Linear(config.lenses * config.lens_width, config.breadth)

    def mixed(self, queries):
        return queries

    def forward(self, x, other=None):
        batch, tokens, _ = x.shape
        size = self.shades * self.lens_width
        keys, values = self.seen(x if other is None else other).split([size, size], -1)
        q = self.mixed(self.ask(x)).view(batch, tokens, self.lenses, -1).transpose(1, 2)
        k, v = (y.view(batch, y.shape[1], self.shades, -1).transpose(1, 2) for y in (keys, values))
        k, v = (y.repeat_interleave(self.lenses // self.shades, 1) for y in (k, v))
        weights = (q @ k.transpose(2, 3) / self.lens_width**0.5).softmax(-1)
        return self.tell((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class Stratum(nn.Module):
    """Both branches read the same norm; the MLP's gate and up are stacked."""

    gaze_class = Gaze

    def __init__(self, config):
        super().__init__()
        self.hush = nn.LayerNorm(config.breadth)
        self.gaze = self.gaze_class(config)
        self.rise = nn.Linear(config.breadth, 2 * config.swell)
        self.fall = nn.Linear(config.swell, config.breadth, bias=False)

    def forward(self, x):
        y = self.hush(x)
        straight, bent = self.rise(y).chunk(2, -1)
        return x + self.gaze(y) + self.fall(straight * torch.sigmoid(bent))


class OddModel(PreTrainedModel):
    """Embeddings and blocks."""

    config_class = OddConfig
    stratum_class = Stratum

    def __init__(self, config):
        super().__init__(config)
        self.lexicon = nn.Embedding(config.words, config.breadth)
        self.strata = nn.ModuleList(self.stratum_class(config) for _ in range(config.strata))
        self.post_init()

    def get_input_embeddings(self):
        return self.lexicon

    def forward(self, input_ids, **_):
        x = self.lexicon(input_ids)
        for stratum in self.strata:
            x = stratum(x)
        return BaseModelOutput(last_hidden_state=x)


def variant(name: str, **members) -> type[OddModel]:
    """Return a subclass of the model, with members of its own."""
    return type(name, (OddModel,), members)


class MixedGaze(Gaze):
    """A norm over all heads at once."""

    def __init__(self, config):
        super().__init__(config)
        self.blend = nn.RMSNorm(config.lenses * config.lens_width)

    def mixed(self, queries):
        return self.blend(queries)


class NormedStratum(Stratum):
    """A norm over all channels of the MLP."""

    def __init__(self, config):
        super().__init__(config)
        self.level = nn.RMSNorm(config.swell)

    def forward(self, x):
        y = self.hush(x)
        straight, bent = self.rise(y).chunk(2, -1)
        return x + self.gaze(y) + self.fall(self.level(straight * torch.sigmoid(bent)))


class BareGaze(nn.Module):
    """Attention by a parameter and no linear layer."""

    def __init__(self, config):
        super().__init__()
        self.weight_of_all = nn.Parameter(torch.randn(3, config.breadth, config.breadth))

    def forward(self, x):
        q, k, v = (x @ weight for weight in self.weight_of_all)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


def stratum_with(gaze: type[nn.Module]) -> type[Stratum]:
    return type("Stratum", (Stratum,), {"gaze_class": gaze})


class Loose(OddModel):
    """Blocks that are in no list."""

    def __init__(self, config):
        super().__init__(config)
        del self.strata
        self.one, self.two = Stratum(config), Stratum(config)

    def forward(self, input_ids, **_):
        return BaseModelOutput(last_hidden_state=self.two(self.one(self.lexicon(input_ids))))


class Between(OddModel):
    """Something is computed between the blocks."""

    def forward(self, input_ids, **_):
        x = self.lexicon(input_ids)
        for stratum in self.strata:
            x = stratum(x).tanh()
        return BaseModelOutput(last_hidden_state=x)


class Raising(OddModel):
    def forward(self, input_ids, **_):
        raise KeyError("no tokens today")


class Random(OddModel):
    def forward(self, input_ids, **_):
        x = super().forward(input_ids).last_hidden_state
        return BaseModelOutput(last_hidden_state=x + torch.rand(()))


class RawStratum(Stratum):
    """The MLP reads the stream as it is."""

    def forward(self, x):
        straight, bent = self.rise(x).chunk(2, -1)
        return x + self.gaze(self.hush(x)) + self.fall(straight * torch.sigmoid(bent))


class FlippedStratum(Stratum):
    """The MLP reads the features of the stream in another order."""

    def forward(self, x):
        straight, bent = self.rise(x.flip(-1)).chunk(2, -1)
        return x + self.gaze(self.hush(x)) + self.fall(straight * torch.sigmoid(bent))


class BranchStratum(Stratum):
    """What a branch writes is normalised before it is added."""

    def __init__(self, config):
        super().__init__(config)
        self.calm = nn.RMSNorm(config.breadth)

    def forward(self, x):
        y = self.hush(x)
        straight, bent = self.rise(y).chunk(2, -1)
        return x + self.gaze(y) + self.calm(self.fall(straight * torch.sigmoid(bent)))


class Averaged(OddModel):
    """A head that reads the mean over all tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.calm, self.verdict = nn.LayerNorm(config.breadth), nn.Linear(config.breadth, 3)

    def forward(self, input_ids, **_):
        x = self.calm(super().forward(input_ids).last_hidden_state)
        return BaseModelOutput(last_hidden_state=self.verdict(x.mean(1)))


class Scaled(OddModel):
    """Embeddings are scaled by the root of what the config says."""

    def forward(self, input_ids, **_):
        x = self.lexicon(input_ids) * self.config.breadth**0.5
        for stratum in self.strata:
            x = stratum(x)
        return BaseModelOutput(last_hidden_state=x)


class Slim(OddModel):
    """Embeddings are narrower than the stream."""

    def __init__(self, config):
        super().__init__(config)
        self.lexicon, self.widen = nn.Embedding(config.words, 14), nn.Linear(14, config.breadth)

    def forward(self, input_ids, **_):
        x = self.widen(self.lexicon(input_ids))
        for stratum in self.strata:
            x = stratum(x)
        return BaseModelOutput(last_hidden_state=x)


class Skewed(nn.LayerNorm):
    """A norm by a sum, which grows with the number of features."""

    def forward(self, x):
        return self.weight * x / (1 + x.abs().sum(-1, keepdim=True)) + self.bias


class SkewedStratum(Stratum):
    """Its norm isn't one of a mean."""

    def __init__(self, config):
        super().__init__(config)
        self.hush = Skewed(config.breadth)


class Herd(nn.Module):
    """Experts that have columns for rows; what is linear stands beside what bends it."""

    def __init__(self, config):
        super().__init__()
        self.flock, self.girth = config.flock, config.swell
        shape = (config.flock, config.breadth, 2 * config.swell)
        self.ascent = nn.Parameter(0.1 * torch.randn(shape))
        self.descent = nn.Parameter(0.1 * torch.randn(config.flock, config.swell, config.breadth))
        self.descent_bias = nn.Parameter(0.1 * torch.randn(config.flock, config.breadth))

    def _apply_gate(self, both):
        return both[..., ::2] * torch.sigmoid(both[..., 1::2])

    def forward(self, x, chosen, shares):
        y = torch.zeros_like(x)
        for one in range(self.flock):
            token, place = torch.where(chosen == one)
            z = self._apply_gate(x[token] @ self.ascent[one])
            z = z @ self.descent[one] + self.descent_bias[one]
            y.index_add_(0, token, z * shares[token, place, None])
        return y


class BlendedHerd(Herd):
    """Channels of an expert are normalised together."""

    def _apply_gate(self, both):
        return super()._apply_gate(both).softmax(-1)


class Shepherd(nn.Module):
    """Sends a token to two experts."""

    def __init__(self, config):
        super().__init__()
        self.top_k = 2
        self.weight = nn.Parameter(0.1 * torch.randn(config.flock, config.breadth))

    def forward(self, x):
        logits = x @ self.weight.T
        shares, chosen = logits.softmax(-1).topk(self.top_k)
        return logits, shares / shares.sum(-1, keepdim=True), chosen


class MutteringShepherd(Shepherd):
    """Gives experts and no weights."""

    def forward(self, x):
        return super().forward(x)[2]


class FlockConfig(OddConfig):
    model_type = "flock"

    def __init__(self, flock=5, **fields):
        self.flock = flock
        super().__init__(**fields)


class Pasture(nn.Module):
    """Attention, then experts."""

    herd_class, shepherd_class = Herd, Shepherd

    def __init__(self, config):
        super().__init__()
        self.hush, self.lull = nn.LayerNorm(config.breadth), nn.LayerNorm(config.breadth)
        self.gaze = Gaze(config)
        self.herd, self.shepherd = self.herd_class(config), self.shepherd_class(config)

    def forward(self, x):
        x = x + self.gaze(self.hush(x))
        y = self.lull(x).flatten(0, 1)
        given = self.shepherd(y)
        if isinstance(given, torch.Tensor):
            given = None, torch.full(given.shape, 0.5, dtype=x.dtype), given
        return x + self.herd(y, given[2], given[1]).view_as(x)


class FlockModel(OddModel):
    """A mixture of experts."""

    config_class = FlockConfig
    stratum_class = Pasture


def flock(**members) -> type[FlockModel]:
    """Return a mixture of experts with members of its own in a block."""
    pasture = type("Pasture", (Pasture,), members)
    return type("Flock", (FlockModel,), {"stratum_class": pasture})


class StrictHerd(Herd):
    """It knows its weights, and computes with no others."""

    def forward(self, x, chosen, shares):
        if not self.descent.any():
            raise ArithmeticError("no descent")
        return super().forward(x, chosen, shares)


class StrictNorm(nn.LayerNorm):
    """It knows its weights, and computes with no others."""

    def forward(self, x):
        if not self.weight.any():
            raise ArithmeticError("no weight")
        return super().forward(x)


class StrictStratum(Stratum):
    """It has such a norm."""

    def __init__(self, config):
        super().__init__(config)
        self.hush = StrictNorm(config.breadth)


class Twice(OddModel):
    """Two lookups in one table."""

    def forward(self, input_ids, **_):
        x = self.lexicon(input_ids) + self.lexicon(input_ids.flip(1))
        for stratum in self.strata:
            x = stratum(x)
        return BaseModelOutput(last_hidden_state=x)


class DuetConfig(OddConfig):
    model_type = "duet"

    def __init__(self, **fields):
        super().__init__(**{"is_encoder_decoder": True, **fields})


class Echo(nn.Module):
    """Attention to what the other stack has made, between two branches of its own."""

    glance_class = Gaze

    def __init__(self, config):
        super().__init__()
        self.hush, self.calm = nn.LayerNorm(config.breadth), nn.LayerNorm(config.breadth)
        self.gaze, self.glance = Gaze(config), self.glance_class(config)
        self.rise = nn.Linear(config.breadth, config.swell)
        self.fall = nn.Linear(config.swell, config.breadth)

    def forward(self, x, other):
        x = x + self.gaze(self.hush(x))
        x = x + self.glance(x, other)
        return x + self.fall(self.rise(self.calm(x)).relu())


class MixedEcho(Echo):
    """A norm over all heads of the attention to the other stack."""

    glance_class = MixedGaze


class DeafEcho(Echo):
    """It has layers for the other stack, and doesn't use them."""

    def forward(self, x, other):
        x = x + self.gaze(self.hush(x))
        return x + other.mean(1, keepdim=True) + self.fall(self.rise(self.calm(x)).relu())


class DuetModel(OddModel):
    """Two stacks, of which the second reads the first."""

    config_class = DuetConfig
    echo_class = Echo

    def __init__(self, config):
        super().__init__(config)
        self.echoes = nn.ModuleList(self.echo_class(config) for _ in range(config.strata))

    def forward(self, input_ids, decoder_input_ids, **_):
        other, x = super().forward(input_ids).last_hidden_state, self.lexicon(decoder_input_ids)
        for echo in self.echoes:
            x = echo(x, other)
        return BaseModelOutput(last_hidden_state=x)
