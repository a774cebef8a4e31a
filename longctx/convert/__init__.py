"""Weight conversion: Hugging Face transformers, Megatron-Core, and upcycling of dense models to routed ones."""
