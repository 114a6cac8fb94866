"""Runs a study: the jobs of all its parts, each of which may fail alone, and the results of the whole."""
