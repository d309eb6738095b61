"""How good pruned language models are: methods × fractions removed × seeds, on several models.

``python -m bench.quality --help`` says what can be chosen, ``make quality`` runs the defaults and
``make quality-short`` a form of it for a machine that has twenty minutes.
"""
