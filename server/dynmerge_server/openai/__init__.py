"""The OpenAI endpoints of the embedded engine, with vLLM's extra fields. vLLM brings its own."""
