"""Hydra configuration, data only: the dataclasses it fills stand beside the classes they configure."""
