"""Inference on the CPU: weights, paged KV cache, scheduler, sampling, stopping; uses the compiled kernels, no torch."""
