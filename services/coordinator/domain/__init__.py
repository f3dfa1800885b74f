"""Pure decisions about jobs: what holds now, what was seen, what follows. No I/O, no clock of its own."""
