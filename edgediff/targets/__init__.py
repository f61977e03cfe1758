"""Target formats, a folder each: how graphs are written, read back and run."""
