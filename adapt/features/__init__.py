"""Where training reads its inputs: stored tokens (`cached.py`), the running backbone (`online.py`), or images."""
