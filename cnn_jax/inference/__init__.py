"""Bundles, predictors, and the metrics of predictors."""
