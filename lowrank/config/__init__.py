"""The YAML schema of a run: types, defaults, checks, messages."""

from lowrank.config.loading import ConfigError, dump_config, load_config
from lowrank.config.run_config import RunConfig

__all__ = ["ConfigError", "RunConfig", "dump_config", "load_config"]
