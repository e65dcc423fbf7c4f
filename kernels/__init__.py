"""Fused operations for the head of a language model. Each file stands alone: the plain way, Triton
kernels for CUDA, the same passes in plain torch for everything else, and one public function. The
training scripts work without this folder; with it they hold no logits of all tokens.
"""
