"""nanostack: pre-train Llama models by stacking them while they train."""

import sys

if sys.platform == "win32":
    print("error: nanostack runs on Linux; on Windows, use WSL (https://learn.microsoft.com/windows/wsl)", file=sys.stderr)
    sys.exit(2)

from nanostack import names
from nanostack.version import __version__ as __version__

names.install()
