"""Hyper-parameter studies: many runs, of which the next is chosen by what came of the others."""

# How trials that fall behind are given up: in several brackets, in the most eager one, or never.
PRUNERS = ("hyperband", "halving", "none")
