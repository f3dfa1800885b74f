"""Gateway: the HTTP API in front of coordinator and discovery."""
