"""Recipes: frozen structs read from strict YAML, and what several of them choose from."""
