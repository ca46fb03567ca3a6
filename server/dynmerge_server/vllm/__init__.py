"""dynmerge in vLLM's own server: what is added to its requests, replies and routes."""
