"""Linear recurrences and short convolutions over ranks: state exchange (LASP-2, LASP-1, tree) and halo exchange."""
