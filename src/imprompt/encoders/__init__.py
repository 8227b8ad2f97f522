"""Image -> features."""
