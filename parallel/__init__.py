"""The same mathematics across ranks: mesh, sequence layout, collectives, the state scan, attention schedules.

The only caller of `torch.distributed` collectives outside the training engines.
"""
