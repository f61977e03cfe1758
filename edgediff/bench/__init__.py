"""The same model in every backend, timed in one run: `edgediff bench`."""
