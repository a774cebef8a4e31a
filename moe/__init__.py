"""Routing: head and expert routers, mixtures of heads, dropless expert computation, upcycling of dense models."""
