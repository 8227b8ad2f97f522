"""Generate images with an adapted model."""
