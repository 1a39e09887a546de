"""Explanations of predictions: maps, checks of the maps, feature maps and filters."""
