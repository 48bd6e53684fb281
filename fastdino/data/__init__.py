"""From files to crops: sources (bytes), decode (uint8 images), augment (crops), loader (batches)."""
