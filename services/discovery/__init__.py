"""Discovery: who is in the network, where, with what, how healthy."""
