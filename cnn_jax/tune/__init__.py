"""Hyper-parameter studies: many runs, of which the next is chosen by what came of the others."""
