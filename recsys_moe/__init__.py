"""Multi-task recommendation with mixtures of experts: train, compare and serve on one road."""

__version__ = "0.1.0"
