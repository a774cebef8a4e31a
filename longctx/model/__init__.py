"""The model: a decoder whose layers are a pattern over mixers."""
