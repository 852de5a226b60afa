"""Calibrated rounding into the block types that every reader of GGUF knows."""
