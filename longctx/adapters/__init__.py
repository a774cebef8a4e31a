"""Adapters for Megatron-Core, DeepSpeed and Hugging Face; each imports its framework, and nothing else does."""
