"""The C++ module `_core` and the BLAS library, behind Python faces that tell the truth about them.

Lives here: one header, one source and one face per component; each says if it is active and why not.
Does not live here: decisions about when to use a component; nothing here imports MLX.
"""
