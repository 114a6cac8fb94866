"""Turns result rows into means over seeds, tables, charts and report.html."""
