"""The server process: bytes in, tokens out.

Lives here: the composition root (`app`), the command line, one package per role (docs/architecture.md).
Does not live here: message types, settings, C++.
"""
