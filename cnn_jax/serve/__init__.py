"""The HTTP server for bundles; it imports no training code."""
