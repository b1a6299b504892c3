"""Start a whole mesh on this machine: python -m services.up --help"""

import sys

import uvloop
from rich.console import Console

from services.up.mesh import serve
from services.up.options import parse
from shared.config import ConfigError
from shared.run import EXIT_USAGE

if __name__ == "__main__":
    console = Console(stderr=True)
    try:
        code = uvloop.run(serve(parse(), console))
    except ConfigError as error:
        console.print(f"headrace: {error}", style="red", markup=False)
        code = EXIT_USAGE
    sys.exit(code)
