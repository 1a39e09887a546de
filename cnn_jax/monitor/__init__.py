"""Watches a served network: drift, estimated accuracy, and the images worth labelling."""
