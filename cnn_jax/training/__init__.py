"""Training: the step, the host loop and what a run leaves behind."""
