"""The server process: bytes in, tokens out.

Lives here: the composition root (`app`), the command line, and one package per role; see docs/architecture.md.
Does not live here: message types, settings, C++.
"""
