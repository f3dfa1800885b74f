"""The five services; each folder is one container."""
