"""Distilled Decoding itself, readable alone: the room to enter first.

`flow` carries noise to a token, `teacher` to a whole sequence; `student` jumps there at once.
"""
