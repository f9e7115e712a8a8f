"""JPEG bytes to batches: augmentation policies and the backends that carry them out."""
