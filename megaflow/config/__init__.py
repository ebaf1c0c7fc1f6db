"""The typed configuration: schema.py says what may be set, load.py turns files and overrides into it, check.py what values mean together,
check_flow.py what choices of flows and maps forbid each other."""
