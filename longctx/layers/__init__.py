"""Layers below the mixers: norms, rotary positions, routers, feature maps, the decoding cache."""
