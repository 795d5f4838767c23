"""How well a model does: likelihoods, perplexity, multiple choice, exact answers, retrieval.

A library without a command line; `minim3 eval` (docs/evaluation.md) stands on it.
"""
