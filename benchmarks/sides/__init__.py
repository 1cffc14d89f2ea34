"""Ours and its peers, each in a process of its own, all asked and answering by the same lines of JSON.

Lives here: the processes (`sidecar_node.mjs`, `sidecar_python.py`, `in_process.py`, `http_server.py`), what
starts and asks them (`side.py`), what keeps several of them (`bench.py`), the lines (`rounds.py`), the
prompts, and the sums made of the answers.
"""
