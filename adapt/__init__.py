"""Stage two: batches -> side network or probe -> metrics -> report."""
