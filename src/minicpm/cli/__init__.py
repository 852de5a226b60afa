"""The command line: one verb per file, thin; `main` dispatches lazily."""
