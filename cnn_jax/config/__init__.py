"""Configurations: keys and their checks, files, and flags."""
