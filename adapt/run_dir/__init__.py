"""Reads and writes the files of a run directory: results, configuration, lock."""
