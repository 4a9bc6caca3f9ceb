"""sparqle-stream: live captions from a chunk-causal encoder, a Q-Former and a small LLM."""

__version__ = "0.1.0"
