"""What `nanostack COMMAND` runs: a command parses, calls the library, and reports."""
