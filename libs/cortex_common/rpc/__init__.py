"""gRPC with mutual TLS: servers, channels, who may call what, and errors that survive the wire."""
