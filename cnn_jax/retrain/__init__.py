"""Retrains a served network on the labelled images of its request log."""
