"""Text for the terminal: tables, progress bars, and foreign names made safe to print."""
