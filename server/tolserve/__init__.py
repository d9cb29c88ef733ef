"""tolserve: an inference server for MemoryLLM models (arXiv 2602.00398)."""

__version__ = "0.1.0"
