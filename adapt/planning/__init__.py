"""Estimates what a job will cost before it runs."""
