"""Recipes: complete training runs as TOML."""

from longctx.recipe.emit import dump
from longctx.recipe.schema import Recipe, check, load

__all__ = ["Recipe", "check", "dump", "load"]
