"""Inference: bundles, predictors and their metrics."""
