"""Corruptions of images, and the robustness of predictors against them."""
