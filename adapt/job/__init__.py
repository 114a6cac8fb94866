"""The training job: its inputs, its checks, and the run over methods and seeds."""
