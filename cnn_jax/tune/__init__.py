"""Hyper-parameter studies: many runs; earlier results decide which values are tried next."""

# Rules that stop bad trials early: all brackets of Hyperband, only the bracket that stops the
# most trials, or no early stop.
PRUNERS = ("hyperband", "halving", "none")
