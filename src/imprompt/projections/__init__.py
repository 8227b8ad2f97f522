"""Image features -> image tokens."""
