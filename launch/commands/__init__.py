"""Arguments of the groups of commands, one module per group."""
