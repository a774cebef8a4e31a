"""Training engines: the protocol, the torch engine (FSDP2), router statistics, metrics."""
