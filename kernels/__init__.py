"""Single-device operators: linear recurrences, block attention, routed computation, tiled loss, with references.

Nothing here knows about process groups. Shape letters, everywhere in the project: B batch, T tokens, H heads, K key dim
per head, V value dim per head, D model dim, N vocabulary.
"""
