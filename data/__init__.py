"""Rows beyond a .jsonl file: other formats, published data sets, the hub, conversions."""
