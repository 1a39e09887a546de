"""Configurations: their keys, the checks of values, configuration files and flags."""
