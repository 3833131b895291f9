"""Numbers produced by the public reference scripts; our code must reproduce them.

python -m tests.parity DIR [--only KIND]
"""
