"""Reads the results of any number of runs, and shows them as one table, a pivot or ranks."""
