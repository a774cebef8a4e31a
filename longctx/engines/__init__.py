"""Training engines: the protocol, the torch engine (FSDP2), gradient accumulation, router statistics, metrics."""
