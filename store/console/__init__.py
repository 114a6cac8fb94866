"""Prints tables and progress bars on the terminal, with untrusted names made safe."""
