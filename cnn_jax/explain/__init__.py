"""Explanations of predictions: saliency maps, checks of the maps, feature maps and filters."""
