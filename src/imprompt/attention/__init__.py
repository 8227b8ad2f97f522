"""Image tokens in the attention: what is added, when, and how fast."""
