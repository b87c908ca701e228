"""Audio: files, front end, encoders, rotary time."""
