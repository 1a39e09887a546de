"""Configurations: keys with their checks, files and flags."""
