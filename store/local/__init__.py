"""Reads and writes the files of a store in a local folder, without tensorstore."""
