"""The trainer child: one process for one job, with torch, without keys, certificates or network."""
