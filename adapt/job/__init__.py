"""Runs a job: checks its configuration, opens its features, trains every method and records the results."""
