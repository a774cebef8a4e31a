"""Sequence, tensor and expert parallelism: mesh, sequence layout, collectives, state exchange, attention schedules.

Outside the training engines, only this package calls `torch.distributed` collectives.
"""
