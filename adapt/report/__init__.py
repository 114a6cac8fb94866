"""Averages result rows over seeds, and shows them as tables, charts and report.html."""
