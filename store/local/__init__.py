"""The fast path for stores in a local folder: plain files, read and written without tensorstore."""
