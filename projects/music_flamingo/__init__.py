"""Music Flamingo: an audio-language model that reasons about music."""
