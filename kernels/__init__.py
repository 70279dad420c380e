"""Fused expert operations: one public function per operation, importable as `recsys_moe.kernels` only."""

if __name__ == "kernels":
    # Two names would be two modules: operators would register twice, and `transformers` would take this folder for the
    # Hugging Face package called `kernels`.
    raise ImportError("this folder is recsys_moe.kernels: import it under that name")

from recsys_moe.kernels.reference import expert_mlp, gate_mix

__all__ = ["expert_mlp", "gate_mix"]
