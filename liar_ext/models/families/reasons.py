"""Why something can't be done with a family, in the words of ``Family.without``."""

JOINT = "its q_norm and k_norm run over all heads at once"
BORROWED = "some layers read keys and values of others"
PICTURES = "what reads pictures writes hidden features, too"
HEADS_OF_HIDDEN = "heads: its config derives the size of a head from the hidden size"
ROUTED = "its routers read it, and a narrower one sends tokens elsewhere"
