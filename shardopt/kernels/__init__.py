"""Native steps: a recipe's key composed of C++ structs, compiled on first use; never a different result."""

from shardopt.kernels.cache import cache_folder
from shardopt.kernels.key import Key, NoTwin, key_at, key_of
from shardopt.kernels.native import Native, key_for
from shardopt.kernels.replay import Above

__all__ = ["Above", "Key", "Native", "NoTwin", "cache_folder", "key_at", "key_for", "key_of"]
