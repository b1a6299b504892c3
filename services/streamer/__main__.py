"""Run one streamer: python -m services.streamer"""

from services.streamer.app import main
from shared.config import StreamerConfig
from shared.run import run

if __name__ == "__main__":
    run("streamer", StreamerConfig, main)
