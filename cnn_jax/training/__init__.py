"""Training: the training step, the loop on the host, and the files of a run."""
