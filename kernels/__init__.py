"""The mathematics of one device: linear recurrences, block attention, the tiled loss, and their plain references.

Nothing here knows a process group. Shapes, everywhere in the project: B batch, T tokens, H heads, K key dim per head,
V value dim per head, D model dim, N vocabulary.
"""
