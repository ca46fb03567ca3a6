"""The embedded engine: transformers' continuous batching, each request under its own merge."""

from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.engines.transformers.engine import TransformersEngine
from dynmerge.engines.transformers.model import LoadedModel, load_base_model

__all__ = ["EngineConfig", "LoadedModel", "TransformersEngine", "load_base_model"]
