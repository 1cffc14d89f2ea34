"""What is said on the wire: message types, the method table, errors, framing.

Lives here: everything that turns bytes into values and values into bytes, without any I/O.
Does not live here: sockets, pipes, clocks, and what a method does.
"""
