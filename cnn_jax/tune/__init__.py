"""Hyper-parameter studies: many runs; earlier results decide which values are tried next."""

# Rules that stop bad trials early: by all brackets of Hyperband, by the bracket that stops most
# trials, or never.
PRUNERS = ("hyperband", "halving", "none")
