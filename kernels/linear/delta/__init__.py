"""Delta-rule recurrence: DeltaNet, Gated DeltaNet, KDA."""
