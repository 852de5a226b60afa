"""Other people's files, one module each: read, write, and name tables."""
