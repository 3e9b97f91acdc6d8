"""vLLM behind the lab's service."""
