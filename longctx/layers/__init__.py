"""Layers shared by mixers and feed-forwards: projections, norms, rotary embedding, routers, feature maps, the cache."""
