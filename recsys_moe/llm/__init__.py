"""Decoder-only language models on the core's routers, experts and kernels: checkpoints in, tokens out."""
