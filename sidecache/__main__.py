"""Runs the command line for `python -m sidecache` and `torchrun -m sidecache`."""

from sidecache.entry_point import main

if __name__ == "__main__":
    main()
