"""What evaluate.py and compare.py are made of."""
