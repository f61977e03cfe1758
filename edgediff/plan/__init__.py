"""Planning: which steps a bundle can cache at the least cost in the image, for a budget of operations or of time."""
