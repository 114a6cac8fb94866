"""Stores tokens in a Zarr v3 hierarchy with commit marks, checksums and provenance. Imports no torch."""
