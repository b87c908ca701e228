"""Published benchmarks of music understanding as data sources. A user brings the files; they are tested on alone."""
