"""How nodes find and keep each other."""
