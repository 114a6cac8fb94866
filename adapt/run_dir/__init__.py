"""The files of a run directory: results, configuration, lock."""
