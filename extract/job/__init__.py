"""The extraction job: opens the store, extracts missing shards here or on a dask cluster, commits them."""
