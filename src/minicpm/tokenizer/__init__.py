"""Text to token ids and back; chat templates and the supervised mask live here alone."""
