"""Captions to features: a T5, or a table of word vectors where none is at hand.

`encoder` is the form of both, `loading` chooses one by its name or folder.
"""
