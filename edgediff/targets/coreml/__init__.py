"""Core ML: ML Programs in .mlpackage directories."""
