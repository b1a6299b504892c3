"""Run one tokenizer: python -m services.tokenizer"""

from services.tokenizer.service import main
from shared.config import TokenizerConfig
from shared.run import run

if __name__ == "__main__":
    run("tokenizer", TokenizerConfig, main)
