"""How good a model is beside its teacher and baselines, or anyone's images: figures and the page.

`evaluate` is the way in: it prepares (`planning`), makes features (`making`), judges (`judging`)
and looks (`look`); `report` makes the page of it.
"""
