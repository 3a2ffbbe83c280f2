"""What the image service accepts and how it batches, without Ray."""
