"""Corruptions and how well a network copes with them."""
