"""The coordinator: runs jobs, gives workers their work, keeps the books."""
