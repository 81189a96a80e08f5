"""Typed configuration. `schema` holds the dataclasses; `compose` turns YAML and overrides into them.

The dataclasses know nothing of Hydra or OmegaConf, and importing them loads neither torch nor ray.
"""
