"""nanostack: pre-train Llama models by stacking them while they train."""

import sys

if sys.platform == "win32":
    sys.exit("error: nanostack runs on Linux and macOS; on Windows, use WSL (https://learn.microsoft.com/windows/wsl)")

from nanostack import names
from nanostack.version import __version__ as __version__

names.install()
