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
