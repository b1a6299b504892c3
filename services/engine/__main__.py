"""Run one engine: python -m services.engine"""

from services.engine.start import main
from shared.config import EngineConfig
from shared.run import run

if __name__ == "__main__":
    run("engine", EngineConfig, main)
