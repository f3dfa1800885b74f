"""The job as a person writes it (spec) and as they are told about it (status), and both on the wire."""
