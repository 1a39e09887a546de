"""Hyper-parameter studies: many runs, in which earlier results determine the next values."""

# The names of the rules that stop bad trials early: all brackets of Hyperband, only the bracket
# that stops the most trials, or no early stop.
PRUNERS = ("hyperband", "halving", "none")
