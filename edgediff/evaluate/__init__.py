"""How far sets of images are from one another: distances of features, power spectra."""
