"""Trains models: the training loop, the solver of linear probes, the search on validation rows, and metrics."""
