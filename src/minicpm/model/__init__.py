"""The MiniCPM network in PyTorch: the reference that everything else is held to.

Legend of shapes: B sequences, T new positions, S all positions, H query heads, K key/value heads, D head width,
E hidden size, F feed-forward width, V vocabulary, R LoRA rank, G quantization group.
"""
