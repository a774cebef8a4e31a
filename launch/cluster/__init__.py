"""Jobs on clusters: profiles, the files that a scheduler is given, and their submission."""
