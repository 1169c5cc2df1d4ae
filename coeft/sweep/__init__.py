"""Searches over the settings of a run. `settings` says what is searched and how, `search` does it."""
