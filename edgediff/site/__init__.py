"""The browser's page with a bundle: served from this machine, or as a folder for any web host."""
