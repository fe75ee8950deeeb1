"""The version of nanostack: whoever tells it, tells this one."""

__version__ = "0.2.0"
