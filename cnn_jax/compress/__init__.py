"""Smaller networks, made from a bundle by structured pruning and further training."""
