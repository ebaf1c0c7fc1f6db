"""The typed configuration: schema.py says what may be set, load.py turns files and overrides into it."""
