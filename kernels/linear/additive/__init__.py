"""Additive recurrence: linear attention, lightning, retention, simple GLA, Mamba-2, GLA, HGRN-2, LightNet."""
