"""Vision encoders, decoders and the segmentation model."""
