"""Trains models: the loop, the search on validation data, the solver of linear probes, and metrics."""
