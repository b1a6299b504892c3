"""The shared prefix cache: python -m services.prefix_cache"""

from services.prefix_cache.service import main
from shared.config import PrefixCacheConfig
from shared.run import run

if __name__ == "__main__":
    run("prefix_cache", PrefixCacheConfig, main)
