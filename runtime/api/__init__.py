"""The methods: one small module per family, turning a request into calls on the parts below.

Lives here: handlers, called with decoded params and the call they answer.
Does not live here: decoding, framing, or any work that another room owns.
"""
