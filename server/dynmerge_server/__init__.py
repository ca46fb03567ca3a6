"""dynmerge_server: HTTP around the dynmerge runtime. Holds no tensors."""
