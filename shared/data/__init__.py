"""Data sources, assets and augmentation."""
