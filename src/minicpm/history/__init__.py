"""The history: every checkpoint of a run, coded from the one before, provably right, readable by the byte range."""
