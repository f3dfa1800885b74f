"""A training node inside a person's own program."""
