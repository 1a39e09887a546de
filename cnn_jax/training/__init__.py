"""Training: the step, the host loop, and the files of a run."""
