"""Decoder language model: a repeating pattern of mixers, each followed by a feed-forward."""
