"""Generate answers, score them, and keep both: what the online methods share."""
