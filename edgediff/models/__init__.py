"""Models and how they are divided; README.md maps the papers' sections to files."""
