"""Putting a converted checkpoint on the Hub: its model card, its files, and the proof that they arrived."""
