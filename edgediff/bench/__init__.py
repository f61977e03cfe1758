"""The same model in every backend there is, timed in one run: `edgediff bench`."""
