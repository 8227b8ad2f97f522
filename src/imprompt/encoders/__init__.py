"""Image encoders: prepare pictures and encode them to image features."""
