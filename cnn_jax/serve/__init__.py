"""The bundle as a service over HTTP; nothing of training is imported."""
