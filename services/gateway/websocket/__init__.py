"""Nodes over WebSocket: the other way to take part, for those who can only open an outgoing HTTP(S) connection."""
