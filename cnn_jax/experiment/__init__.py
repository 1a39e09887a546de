"""Experiments: comparisons of two versions of a model by logged and live requests."""
